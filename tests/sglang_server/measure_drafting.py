"""Prints how many tokens SGLang keeps per pass that verifies a draft, by number of siblings that the drafts come from.

    PYTHONPATH=.:tests python tests/sglang_server/measure_drafting.py

First turns that the quickstart's policy samples at temperature 1, of groups of 8. Each member is sampled again, of a
group of which a server knows what so many of the others generated, and nothing else; its tokens are the same.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path

from sglang_server.servers import ARGS, start

from launcher.overrides import load_config
from megatron_pbsd.environments import build_environment
from megatron_pbsd.prompts import tasks_between
from megatron_pbsd.rollout.engines.protocol import Chunk, Engine, SiblingTokens

GROUPS, GROUP, SIBLINGS, LONGEST = 12, 8, (0, 1, 3, 7), 8


def main() -> None:
    config = load_config(Path("configs/quickstart.yaml"), ())
    environment = build_environment(config.environment, config.model.path)
    tasks = tasks_between(environment.tasks(config.environment.train_split), config.seed, 0, GROUPS)
    turns = [[Chunk(f"{task.task_id}/{i}", tuple(environment.prompt(task)), config.rollout.max_turn_tokens, config.seed,
                    config.rollout.temperature, tuple(environment.stop_token_ids)) for i in range(GROUP)]
             for task in tasks]
    with tempfile.TemporaryDirectory() as logs:
        engine = start(Path(config.model.path), Path(logs), slots=16, max_context=config.rollout.max_context,
                       longest_draft=LONGEST, args=ARGS | {"max_total_tokens": 16384})
        told = generate(engine, [turn for group in turns for turn in group])
        tokens = sum(len(sibling.tokens) for sibling in told.values()) - sum(len(t.tokens) for g in turns for t in g)
        print(json.dumps({"turns": len(told), "generated_tokens": round(tokens / len(told), 1),
                          "acceptance_length": {n: round(length(engine, turns, told, n), 2) for n in SIBLINGS}}))
        engine.close()


def generate(engine: Engine, turns: list[Chunk]) -> dict[str, SiblingTokens]:
    """What each of them read and generated."""
    engine.submit(turns)
    contexts = {turn.request_id: turn.tokens for turn in turns}
    told = {}
    while ended := engine.collect():
        told |= {result.request_id: SiblingTokens(f"told/{result.request_id}", 0,
                                                  contexts[result.request_id] + result.tokens) for result in ended}
    return told


def length(engine: Engine, turns: list[list[Chunk]], told: dict[str, SiblingTokens], siblings: int) -> float:
    """Mean acceptance length, the token after a draft included."""
    asked = []
    for group in turns:
        for i, turn in enumerate(group):
            others = (group[(i + 1 + k) % GROUP].request_id for k in range(siblings))
            asked.append(replace(turn, group_id=f"{siblings}/{turn.request_id}",
                                 siblings=tuple(told[other] for other in others)))
    before = engine.statistics()
    if generate(engine, asked) != told:
        raise RuntimeError("drafts have changed what is sampled")
    after = engine.statistics()
    return 1 + (after.accepted_tokens - before.accepted_tokens) / (after.drafts - before.drafts)


if __name__ == "__main__":
    main()

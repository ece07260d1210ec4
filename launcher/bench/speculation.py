"""What grouped speculative decoding makes of the embedded engine's speed, by how many sequences run at a time.

speedup_by_slots   processor time without over with drafts, of the same turns: first turns of groups of 16 that the
                   quickstart's policy generates at temperature 1. Both engines run in turn, after a first round in
                   which the one that drafts learns what that costs and brings
always_by_slots    the same of an engine that drafts up to 8 tokens at every step, whatever that costs
acceptance_length  tokens per pass that verified a draft, by slots
speedup_random     as speedup_by_slots, of a policy with random weights, none of whose tokens can be foreseen: what
                   finding that out costs
same_tokens        whether all of them generated the same
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from launcher.overrides import load_config
from megatron_pbsd.config import RunConfig
from megatron_pbsd.environments import build_environment
from megatron_pbsd.prompts import tasks_between
from megatron_pbsd.rollout.engines.embedded.engine import EmbeddedEngine
from megatron_pbsd.rollout.engines.embedded.speculation import Speculation
from megatron_pbsd.rollout.engines.protocol import Chunk

CONFIG = Path("configs/quickstart.yaml")
GROUPS_BY_SLOTS = {64: 12, 16: 12, 4: 4, 1: 2}
GROUP, LONGEST, ROUNDS = 16, 8, 5


def run(overrides: Sequence[str] = ()) -> dict[str, Any]:
    config = load_config(CONFIG, overrides)
    turns = first_turns(config)
    pairs = {slots: compare(config, turns[: groups * GROUP], slots) for slots, groups in GROUPS_BY_SLOTS.items()}
    always = {slots: compare(config, turns[: groups * GROUP], slots, always=True)
              for slots, groups in GROUPS_BY_SLOTS.items()}
    # Such a policy rarely ends a turn.
    random = compare(config, turns[: 4 * GROUP], 16, load_weights=False)
    return {
        "speedup_by_slots": {str(slots): pair["speedup"] for slots, pair in pairs.items()},
        "always_by_slots": {str(slots): pair["speedup"] for slots, pair in always.items()},
        "acceptance_length": {str(slots): pair["acceptance_length"] for slots, pair in always.items()},
        "speedup_random": random["speedup"],
        "same_tokens": all(pair["same"] for pair in (*pairs.values(), *always.values(), random)),
    }


def first_turns(config: RunConfig) -> list[Chunk]:
    environment = build_environment(config.environment, config.model.path)
    tasks = tasks_between(environment.tasks(config.environment.train_split), config.seed, 0,
                          max(GROUPS_BY_SLOTS.values()))
    return [Chunk(f"{task.task_id}/{i}", tuple(environment.prompt(task)), config.rollout.max_turn_tokens, config.seed,
                  config.rollout.temperature, tuple(environment.stop_token_ids), group_id=task.task_id)
            for task in tasks for i in range(GROUP)]


def compare(config: RunConfig, turns: list[Chunk], slots: int, always: bool = False,
            load_weights: bool = True) -> dict[str, Any]:
    """Both engines have the same weights."""
    def engine(name: str, speculation: Speculation | None) -> EmbeddedEngine:
        torch.manual_seed(0)
        return EmbeddedEngine(config.model.path, name=name, slots=slots, max_context=config.rollout.max_context,
                              load_weights=load_weights, speculation=speculation)

    plain, drafting = engine("plain", None), engine("drafting", Speculation(LONGEST, always=always))
    seconds, same = {plain: 0.0, drafting: 0.0}, True
    for number in range(1 + ROUNDS):
        asked = [renamed(turn, number) for turn in turns]
        tokens = {}
        for engine in (plain, drafting) if number % 2 else (drafting, plain):
            gc.collect()
            began = time.process_time()
            tokens[engine] = generate(engine, asked)
            seconds[engine] += (time.process_time() - began) * (number > 0)
        same &= tokens[plain] == tokens[drafting]
    statistics = drafting.statistics()
    length = 1 + statistics.accepted_tokens / statistics.drafts if statistics.drafts else 1.0
    return {"speedup": round(seconds[plain] / seconds[drafting], 3), "acceptance_length": round(length, 2),
            "same": same}


def renamed(turn: Chunk, number: int) -> Chunk:
    """The same prompt, of a group that nothing is known of, and other random numbers."""
    return replace(turn, request_id=f"{number}/{turn.request_id}", group_id=f"{number}/{turn.group_id}")


def generate(engine: EmbeddedEngine, turns: list[Chunk]) -> dict[str, tuple[int, ...]]:
    engine.submit(turns)
    tokens = {}
    while ended := engine.collect():
        tokens |= {result.request_id: result.tokens for result in ended}
        engine.release([result.request_id for result in ended])
    return tokens

"""What grouped speculative decoding makes of the embedded engine's speed, by how many sequences run at a time.

speedup_by_slots   processor time without over with drafts, of the same turns: first turns of groups of 16 that the
                   quickstart's policy generates at temperature 1. The engines run in turn, a few steps each, since
                   the machine is now fast and now slow, after a first round in which those that draft learn what that
                   costs and brings
always_by_slots    the same of an engine that drafts up to 8 tokens at every step, whatever that costs
acceptance_length  tokens per pass that verified a draft, by slots
trees              by number of paths of a draft, the same three of the same turns in the same run. By the rule trees
                   are verified or their first paths, whichever pays more
speedup_random     as speedup_by_slots, of a policy with random weights, none of whose tokens can be foreseen: what
                   finding that out costs
control_by_slots   as speedup_by_slots, of a second engine without drafts in the same rounds: how far from 1 the
control_random     machine brings two engines that do the same
turns              that engines with drafts, and the second without, have generated
different_turns    those of them that differ from the first engine's: where a random number is as near to the boundary
                   between two tokens as rounding is (docs/speculation.md)
"""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping, Sequence
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
ROUNDS_BY_SLOTS = {64: 24, 16: 12, 4: 5, 1: 5}
"""After the first. What takes a second and a half in five says little on a shared machine."""
GROUP, LONGEST = 16, 8
PATHS = (1, 2, 4)
STEPS = 8
"""That an engine makes before it is the next one's turn."""
PLAIN, CONTROL = 0, -1
"""Engines that draft no paths."""


def run(overrides: Sequence[str] = ()) -> dict[str, Any]:
    config = load_config(CONFIG, overrides)
    turns = first_turns(config)
    ruled = {slots: compare(config, turns[: groups * GROUP], slots) for slots, groups in GROUPS_BY_SLOTS.items()}
    always = {slots: compare(config, turns[: groups * GROUP], slots, always=True)
              for slots, groups in GROUPS_BY_SLOTS.items()}
    # Such a policy rarely ends a turn.
    random = compare(config, turns[: 4 * GROUP], 16, paths=(1,), load_weights=False)

    def figures(paths: int) -> dict[str, dict[str, float]]:
        return {name: {str(slots): pairs[paths][key] for slots, pairs in found.items()} for name, found, key in (
            ("speedup_by_slots", ruled, "speedup"), ("always_by_slots", always, "speedup"),
            ("acceptance_length", always, "acceptance_length"))}

    return {
        **figures(1),
        "trees": {str(paths): figures(paths) for paths in PATHS if paths > 1},
        "control_by_slots": {str(slots): pairs[CONTROL]["speedup"] for slots, pairs in ruled.items()},
        "speedup_random": random[1]["speedup"],
        "control_random": random[CONTROL]["speedup"],
        **{name: sum(pair[name] for pairs in (*ruled.values(), *always.values(), random) for pair in pairs.values())
           for name in ("turns", "different_turns")},
    }


def first_turns(config: RunConfig) -> list[Chunk]:
    environment = build_environment(config.environment, config.model.path)
    tasks = tasks_between(environment.tasks(config.environment.train_split), config.seed, 0,
                          max(GROUPS_BY_SLOTS.values()))
    return [Chunk(f"{task.task_id}/{i}", tuple(environment.prompt(task)), config.rollout.max_turn_tokens, config.seed,
                  config.rollout.temperature, tuple(environment.stop_token_ids), group_id=task.task_id)
            for task in tasks for i in range(GROUP)]


def compare(config: RunConfig, turns: list[Chunk], slots: int, always: bool = False, paths: Sequence[int] = PATHS,
            load_weights: bool = True) -> dict[int, dict[str, Any]]:
    """By number of paths. All engines have the same weights, and run in turn, forwards and backwards."""
    def engine(name: str, speculation: Speculation | None) -> Interrupted:
        torch.manual_seed(0)
        return Interrupted(config.model.path, name=name, slots=slots, max_context=config.rollout.max_context,
                              load_weights=load_weights, speculation=speculation)

    engines = {PLAIN: engine("plain", None), CONTROL: engine("control", None)} | {
        k: engine(f"{k} paths", Speculation(LONGEST, k, always)) for k in paths}
    seconds, made, different = (dict.fromkeys(engines, zero) for zero in (0.0, 0, 0))
    for number in range(1 + ROUNDS_BY_SLOTS[slots]):
        asked = [renamed(turn, number) for turn in turns]
        order = list(engines) if number % 2 else list(reversed(engines))
        tokens, took = generate({k: engines[k] for k in order}, asked)
        for k in engines:
            seconds[k] += took[k] * (number > 0)
            made[k] += len(asked)
            different[k] += sum(tokens[k][name] != said for name, said in tokens[PLAIN].items())
    return {k: {"speedup": round(seconds[PLAIN] / seconds[k], 3), "turns": made[k], "different_turns": different[k],
                "acceptance_length": acceptance_length(engines[k])} for k in (CONTROL, *paths)}


def acceptance_length(engine: EmbeddedEngine) -> float:
    statistics = engine.statistics()
    return round(1 + statistics.accepted_tokens / statistics.drafts, 2) if statistics.drafts else 1.0


def renamed(turn: Chunk, number: int) -> Chunk:
    """The same prompt, of a group that nothing is known of, and other random numbers."""
    return replace(turn, request_id=f"{number}/{turn.request_id}", group_id=f"{number}/{turn.group_id}")


class Interrupted(EmbeddedEngine):
    """Its `collect` makes a few steps at most."""

    steps = 0

    def _step(self) -> None:
        super()._step()
        self.steps += 1
        if self.steps % STEPS == 0:
            self.interrupt()


def generate(
    engines: Mapping[int, Interrupted], turns: Sequence[Chunk]
) -> tuple[dict[int, dict[str, tuple[int, ...]]], dict[int, float]]:
    """What each engine says to the same turns, and its processor seconds."""
    tokens: dict[int, dict[str, tuple[int, ...]]] = {k: {} for k in engines}
    seconds = dict.fromkeys(engines, 0.0)
    for engine in engines.values():
        engine.submit(turns)
    gc.collect()
    while left := [k for k in engines if len(tokens[k]) < len(turns)]:
        for k in left:
            began = time.process_time()
            ended = engines[k].collect()
            engines[k].abort(())  # So ends the interruption.
            engines[k].release([result.request_id for result in ended])
            seconds[k] += time.process_time() - began
            tokens[k] |= {result.request_id: result.tokens for result in ended}
    return tokens, seconds

"""The rollout: what a decision of its scheduler costs, what policies bring live (`live_rollout`), and how much of
drafts from siblings is accepted (`drafting`).

A decision is one placement, with the events that lead to it, in processor time of one thread. Groups of 8 requests of
lognormal length (median 8000 tokens, sigma 0.8, three quarters of the variance between groups) run in chunks of 2048 on
1000 engines. Whichever chunk in flight ends next is random; its request is submitted again or over, and the scheduler
places what waits. `decisions_per_s` is the slower of the policies: 100 000 requests, half of them in flight.
`cost_ratio_1m_over_10k`, the worse of the policies, has 5 000 in flight, of 1 000 000 or of 10 000.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

from launcher.bench import drafting, live_rollout
from megatron_pbsd.errors import UsageError
from megatron_pbsd.rollout.length_context import LengthContext
from megatron_pbsd.rollout.length_model import LengthModel
from megatron_pbsd.rollout.policies.context_aware import ContextAware
from megatron_pbsd.rollout.policies.longest_remaining import LongestRemaining
from megatron_pbsd.rollout.scheduler import Policy, Scheduler

ENGINES, GROUP, CHUNK, LIMIT, PROMPT = 1_000, 8, 2_048, 65_536, 1_024
DECISIONS, REPEATS = 8_000, 5
POLICIES: dict[str, Callable[[], Policy]] = {
    "context_aware": lambda: ContextAware(CHUNK, LengthContext(LIMIT)),
    "longest_remaining": lambda: LongestRemaining(CHUNK, LengthModel(LIMIT)),
}


def run(overrides: Sequence[str] = ()) -> dict[str, Any]:
    if overrides:
        raise UsageError(f"the bench 'rollout' reads no configuration, so {overrides[0]} means nothing to it")
    numbers: dict[str, float] = {}
    ratios = []
    for name, make in POLICIES.items():
        numbers[f"decisions_per_s_{name}"] = 1 / best(make, 100_000, 50)
        ratios.append(best(make, 1_000_000, 5) / best(make, 10_000, 5))
        numbers[f"cost_ratio_1m_over_10k_{name}"] = ratios[-1]
    speeds = [numbers[f"decisions_per_s_{name}"] for name in POLICIES]
    return {"decisions_per_s": min(speeds), "cost_ratio_1m_over_10k": max(ratios), **numbers, **live_rollout.run(),
            "acceptance_by_siblings": drafting.acceptance_by_siblings(drafting.real_traces())}


def best(make: Callable[[], Policy], requests: int, slots: int) -> float:
    """Seconds per decision: of some stretches of one rollout, the fastest."""
    rollout = Rollout(make(), requests, slots)
    gc.collect()
    gc.freeze()  # what lives as long as the rollout need not be searched for garbage again and again
    try:
        return min(rollout.seconds_per_decision(DECISIONS) for _ in range(REPEATS))
    finally:
        gc.unfreeze()


class Rollout:
    def __init__(self, policy: Policy, requests: int, slots: int):
        self._random = random.Random(0)
        self._scheduler = Scheduler(policy)
        for i in range(ENGINES):
            self._scheduler.engine_joined(f"engine-{i}", slots, slots * LIMIT)
        self._left: dict[str, int] = {}
        self._done: dict[str, int] = {}
        self._group: dict[str, str] = {}
        for group in range(requests // GROUP):
            median = 8_000 * self._random.lognormvariate(0, 0.8 * 0.75 ** 0.5)
            for member in range(GROUP):
                name = f"{group}/{member}"
                self._group[name] = str(group)
                self._left[name] = min(LIMIT, 1 + int(median * self._random.lognormvariate(0, 0.4)))
                self._done[name] = 0
                self._scheduler.submitted(name, str(group), PROMPT, LIMIT)
        self._in_flight = self._scheduler.decisions()

    def seconds_per_decision(self, decisions: int) -> float:
        scheduler, in_flight, left, done = self._scheduler, self._in_flight, self._left, self._done
        began, made = time.process_time(), 0
        while made < decisions and in_flight:
            at = int(self._random.random() * len(in_flight))
            chunk, in_flight[at] = in_flight[at], in_flight[-1]
            in_flight.pop()
            name = chunk.request_id
            tokens = min(CHUNK, left[name])
            scheduler.chunk_finished(name, tokens)
            left[name] -= tokens
            done[name] += tokens
            if left[name]:
                scheduler.submitted(name, self._group[name], PROMPT + done[name], LIMIT - done[name])
            else:
                scheduler.request_finished(name)
            placed = scheduler.decisions()
            made += len(placed)
            in_flight += placed
        return (time.process_time() - began) / made

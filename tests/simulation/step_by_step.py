"""A cluster simulated one step at a time, with none of the closed forms: the reference for `simulation.engine`.

Whole requests on one engine, or chunks as a scheduler decides; no speculation, no failures.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass


@dataclass
class Sequence:
    name: str
    context: int
    missing: int
    tokens: int


class SteppedEngine:
    """Takes (time, sequence) arrivals and runs until all are over."""

    def __init__(self, cost, slots, watermark=0):
        self.cost, self.slots, self.watermark = cost, slots, watermark

    def run(self, arrivals):
        """Returns name → time, and the number of preemptions. Arrivals join at the first boundary at or after them;
        at a boundary the finished leave, then memory is made for the next step, then the waiting are admitted."""
        cost, arrivals = self.cost, deque(sorted(arrivals, key=lambda a: a[0]))
        clock, running, waiting, finished, preemptions = 0.0, [], deque(), {}, 0
        while arrivals or running or waiting:
            for sequence in [s for s in running if s.tokens == 0]:
                running.remove(sequence)
                finished[sequence.name] = clock
            while len(running) > 1 and sum(s.context + 1 for s in running) > cost.kv_tokens:
                victim = running.pop()
                victim.missing = victim.context
                waiting.appendleft(victim)
                preemptions += 1
            clock = self._admit(running, waiting, clock)
            if not running and arrivals:
                clock = max(clock, arrivals[0][0])
            while arrivals and arrivals[0][0] <= clock + 1e-12:
                waiting.append(arrivals.popleft()[1])
                clock = self._admit(running, waiting, clock)
            if running:
                clock += cost.step + cost.per_token * len(running) + cost.per_kv * sum(s.context for s in running)
                for sequence in running:
                    sequence.context += 1
                    sequence.tokens -= 1
        return finished, preemptions

    def _admit(self, running, waiting, clock):
        while waiting and len(running) < self.slots:
            used = sum(s.context + 1 for s in running)
            if running and used + waiting[0].context + 1 > self.cost.kv_tokens - self.watermark:
                break
            sequence = waiting.popleft()
            clock += sequence.missing * self.cost.per_prefill
            sequence.missing = 0
            running.append(sequence)
        return clock

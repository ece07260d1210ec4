"""One simulated engine: continuous batching in closed form between the events that change its batch.

All its sequences make a step together, so that n steps without an event take the time of an arithmetic series, and
what ends next is found by its step. Chunks join at the first step boundary after they arrive.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from dataclasses import dataclass, field

from megatron_pbsd.simulation.cost import CostModel
from megatron_pbsd.simulation.speculation import Speculation


@dataclass(eq=False, slots=True)
class Run:
    """A chunk in an engine.

    context:   tokens whose KV it has, or has to have before it can go on.
    missing:   those of them that have to be prefilled.
    tokens:    still to be generated.
    siblings:  members of its group that had finished when it started.
    rate:      tokens per step.
    """

    request_id: str
    context: float
    missing: float
    tokens: float
    siblings: int = 0
    rate: float = 1
    since: int = 0
    ends: int = 0
    order: int = 0


@dataclass
class EngineCounters:
    busy_s: float = 0.0
    preemptions: int = 0
    prefilled_tokens: float = 0.0
    generated_tokens: float = 0.0
    steps: int = 0
    peak_kv: float = 0.0


@dataclass(eq=False)
class SimulatedEngine:
    """watermark: tokens of KV that must stay free when it admits a chunk. batches: (time, sequences, tokens of KV)
    whenever the batch changes."""

    name: str
    cost: CostModel
    slots: float
    watermark: int = 0
    speculation: Speculation | None = None
    clock: float = 0.0
    kv: float = 0
    growth: float = 0
    computed: float = 0
    running: dict[str, Run] = field(default_factory=dict)
    queue: deque[Run] = field(default_factory=deque)
    counters: EngineCounters = field(default_factory=EngineCounters)
    batches: list[tuple[float, int, float]] = field(default_factory=list)
    version: int = 0
    _draft: int = 0
    _planned_for: int = 0
    _admitted: int = 0
    _ends: list[tuple[int, int, Run]] = field(default_factory=list)

    def arrive(self, run: Run, time: float) -> None:
        self.advance_to(time)
        self.queue.append(run)
        if not self.running or self._steps_to_event() > 0:  # else those that end at this very step leave first
            self._admit()

    def next_event(self) -> float | None:
        """When a chunk will end or KV run out; None if nothing runs."""
        if not self.running:
            return None
        return self.clock + self._seconds(self._steps_to_event())

    def finish_due(self) -> list[Run]:
        """Go to the next event. The chunks that end with it; none when KV has run out instead."""
        self._advance(self._steps_to_event())
        done = []
        while (run := self._first()) is not None and run.ends <= self.counters.steps:
            heapq.heappop(self._ends)
            self._leave(run)
            run.tokens = 0
            done.append(run)
        self._preempt()
        self._admit()
        return done

    def advance_to(self, time: float) -> None:
        """To the first step boundary at `time` or later, but not beyond the next event; without a batch, to `time`."""
        if not self.running:
            self.clock = max(self.clock, time)
            return
        if time > self.clock:
            self._advance(min(self._steps_until(time - self.clock), self._steps_to_event()))

    def _first(self) -> Run | None:
        ends = self._ends
        while ends:
            step, order, run = ends[0]
            if run.order == order and run.ends == step and self.running.get(run.request_id) is run:
                return run
            heapq.heappop(ends)
        return None

    def _steps_to_event(self) -> int:
        steps = self._first().ends - self.counters.steps
        return max(0, min(steps, math.floor((self.cost.kv_tokens - self.kv) / self.growth)))

    def _seconds(self, steps: int) -> float:
        return self.cost.seconds(steps, self.computed, self.kv, self.growth)

    def _steps_until(self, seconds: float) -> int:
        """Fewest steps that take at least so long: the positive root of the series' sum, rounded up."""
        square = self.cost.per_kv * self.growth / 2
        linear = self._seconds(1) - square
        root = seconds / linear if square == 0 else (
            (math.sqrt(linear * linear + 4 * square * seconds) - linear) / (2 * square))
        steps = max(0, math.ceil(root - 1e-9))
        return steps

    def _advance(self, steps: int) -> None:
        if steps <= 0:
            return
        seconds = self._seconds(steps)
        self.clock += seconds
        self.kv += steps * self.growth
        counters = self.counters
        counters.steps += steps
        counters.busy_s += seconds
        counters.generated_tokens += steps * self.growth
        counters.peak_kv = max(counters.peak_kv, self.kv)

    def _admit(self) -> None:
        """First come, first served, as long as there is a slot and KV."""
        room = self.cost.kv_tokens - self.watermark
        while self.queue and len(self.running) < self.slots:
            run = self.queue[0]
            if self.running and self.kv + self.growth + run.context + 1 > room:
                break
            self.queue.popleft()
            self._join(run)

    def _join(self, run: Run) -> None:
        prefill = run.missing * self.cost.per_prefill
        self.clock += prefill
        self.counters.busy_s += prefill
        self.counters.prefilled_tokens += run.missing
        run.missing = 0
        self._admitted += 1
        run.order = self._admitted
        self.running[run.request_id] = run
        self.kv += run.context
        self._paced(run)
        self._batch_changed()

    def _paced(self, run: Run) -> None:
        run.since = self.counters.steps
        run.rate = 1 if self.speculation is None else self.speculation.tokens_per_step(run.siblings, self._draft)
        run.ends = run.since + math.ceil(run.tokens / run.rate - 1e-9)
        self.growth += run.rate
        self.computed += 1 + self._draft
        heapq.heappush(self._ends, (run.ends, run.order, run))

    def _unpaced(self, run: Run) -> None:
        """Take in what it generated at its present pace."""
        generated = (self.counters.steps - run.since) * run.rate
        run.context += generated
        run.tokens -= generated
        self.growth -= run.rate
        self.computed -= 1 + self._draft

    def _leave(self, run: Run) -> None:
        self._unpaced(run)
        del self.running[run.request_id]
        self.kv -= run.context
        if not self.running:
            self.kv = self.growth = self.computed = 0  # rounding of rates
        self._batch_changed()

    def _preempt(self) -> None:
        """The youngest loses its KV until the next step fits; it goes on, first of those that wait, by recomputing."""
        while len(self.running) > 1 and self.kv + self.growth > self.cost.kv_tokens:
            run = self.running[next(reversed(self.running))]
            self._leave(run)
            run.missing = run.context
            self.queue.appendleft(run)
            self.counters.preemptions += 1

    def _batch_changed(self) -> None:
        count = len(self.running)
        self.batches.append((self.clock, count, self.kv))
        if self.speculation is None or not count or abs(count - self._planned_for) <= 0.1 * self._planned_for:
            return
        self._planned_for = count
        draft = self.speculation.best_draft(self.cost, [run.siblings for run in self.running.values()], self.kv)
        if draft != self._draft:
            for run in self.running.values():
                self._unpaced(run)
            self._draft, self._ends = draft, []
            self.growth = self.computed = 0
            for run in self.running.values():
                self._paced(run)

    def lose(self, time: float) -> None:
        """All its chunks, and what they generated, are gone."""
        self.advance_to(time)
        self.running.clear()
        self.queue.clear()
        self._ends.clear()
        self.kv = self.growth = self.computed = 0
        self.batches.append((self.clock, 0, 0.0))

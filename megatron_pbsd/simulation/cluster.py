"""A discrete-event cluster that drives the scheduler as the coordinator does."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_pbsd.errors import PbsdError
from megatron_pbsd.rollout.scheduler import Assignment, Policy, Scheduler
from megatron_pbsd.simulation.cost import CostModel
from megatron_pbsd.simulation.engine import Run, SimulatedEngine
from megatron_pbsd.simulation.speculation import Speculation
from megatron_pbsd.simulation.workload import Job

Handler = Callable[[float, str, Any], None]
"""(time, request or engine, whatever else it was scheduled with)."""


class SimulationError(PbsdError):
    """The simulated cluster cannot finish its work."""

    component = "simulation"


@dataclass(frozen=True)
class Failure:
    """An engine is lost at `time` and, unless `back` is None, joins again at `back` with nothing in its memory."""

    engine: int
    time: float
    back: float | None = None


@dataclass
class Outcome:
    """finished: request → when it was over (s). moved_tokens: KV that came from the pool. lengths: how good a policy's
    predictions were, where it makes any (`rollout.length_context.Calibration`)."""

    finished: dict[str, float] = field(default_factory=dict)
    engines: list[SimulatedEngine] = field(default_factory=list)
    moves: int = 0
    moved_tokens: int = 0
    decisions: int = 0
    lost_chunks: int = 0
    lengths: dict[str, float] = field(default_factory=dict)

    @property
    def total_s(self) -> float:
        return max(self.finished.values())

    @property
    def tail_s(self) -> float:
        """From when nine tenths of the requests are over until all are."""
        times = sorted(self.finished.values())
        return times[-1] - times[max(0, -(-len(times) * 9 // 10) - 1)]

    @property
    def idle(self) -> float:
        """Part of the engines' time until the end in which they had nothing to do."""
        return 1 - sum(engine.counters.busy_s for engine in self.engines) / (self.total_s * len(self.engines))


@dataclass(eq=False, slots=True)
class _Trajectory:
    """context: tokens of prompt, turns and observations so far; generated: of turns alone. left: tokens that the
    present turn still needs. tokens: of the chunk that has been placed. cached: tokens whose KV `holder`, and the pool,
    keep."""

    job: Job
    context: int
    left: int
    generated: int = 0
    turn: int = 0
    tokens: int = 0
    holder: str | None = None
    cached: int = 0
    placed: Assignment | None = None


class Cluster:
    """limit: most tokens a trajectory generates, which the scheduler knows, as it does not know real lengths.
    watermark: part of the KV memory that engines keep free when they may have to preempt."""

    def __init__(self, cost: CostModel, engines: int, slots: int, limit: int, policy: Policy, watermark: float = 0.0,
                 speculation: Speculation | None = None):
        self._cost, self._slots, self._limit = cost, slots, limit
        self._scheduler = Scheduler(policy)
        bounded = policy.admits and policy.chunk_tokens is not None
        keeps = 0 if bounded else int(watermark * cost.kv_tokens)
        self._engines = {
            f"engine-{i}": SimulatedEngine(f"engine-{i}", cost, slots, keeps, speculation) for i in range(engines)}
        for name in self._engines:
            self._scheduler.engine_joined(name, slots, cost.kv_tokens)
        self._events: list[tuple[float, int, Handler, str, object]] = []
        self._sequence = 0
        self._trajectories: dict[str, _Trajectory] = {}
        self._siblings: Counter[str] = Counter()
        self._outcome = Outcome(engines=list(self._engines.values()))

    def run(self, jobs: Sequence[Job], failures: Sequence[Failure] = ()) -> Outcome:
        for job in jobs:
            self._trajectories[job.request_id] = _Trajectory(job, job.prompt, job.turns[0])
            self._submit(job.request_id)
        for failure in failures:
            self._at(failure.time, self._lost, f"engine-{failure.engine}")
            if failure.back is not None:
                self._at(failure.back, self._joined, f"engine-{failure.engine}")
        self._place(0.0)
        while self._events and self._trajectories:
            time, _, handler, subject, detail = heapq.heappop(self._events)
            handler(time, subject, detail)
            self._place(time)
        if self._trajectories:
            raise SimulationError(f"nothing is left to happen, but {len(self._trajectories)} of {len(jobs)} requests "
                                  "are unfinished: no engine is left, or none fits them")
        return self._outcome

    def _at(self, time: float, handler: Handler, subject: str, detail: object = None) -> None:
        self._sequence += 1
        heapq.heappush(self._events, (time, self._sequence, handler, subject, detail))

    def _submit(self, request_id: str) -> None:
        trajectory = self._trajectories[request_id]
        room = self._limit - trajectory.generated
        self._scheduler.submitted(request_id, trajectory.job.group_id, trajectory.context, room)

    def _place(self, time: float) -> None:
        for made in self._scheduler.decisions():
            self._outcome.decisions += 1
            self._outcome.moves += made.leaves is not None
            self._outcome.moved_tokens += made.pull_tokens
            self._trajectories[made.request_id].placed = made
            if made.pull_tokens:
                self._at(time + made.pull_tokens * self._cost.per_pull, self._arrived, made.request_id, made)
            else:
                self._arrived(time, made.request_id, made)

    def _arrived(self, time: float, request_id: str, made: Assignment) -> None:
        trajectory = self._trajectories[request_id]
        if trajectory.placed is not made:
            return  # its engine was lost while its KV was on the way
        trajectory.tokens = trajectory.left if made.max_tokens is None else min(made.max_tokens, trajectory.left)
        near = trajectory.holder == made.engine or made.pull_tokens > 0
        missing = trajectory.context - (trajectory.cached if near else 0)
        siblings = self._siblings[trajectory.job.group_id]
        engine = self._engines[made.engine]
        engine.arrive(Run(request_id, trajectory.context, missing, trajectory.tokens, siblings), time)
        self._reschedule(engine)

    def _reschedule(self, engine: SimulatedEngine) -> None:
        engine.version += 1
        if (time := engine.next_event()) is not None:
            self._at(time, self._stepped, engine.name, engine.version)

    def _stepped(self, time: float, name: str, version: int) -> None:
        engine = self._engines[name]
        if engine.version != version:
            return  # something came in between
        for run in engine.finish_due():
            self._chunk_over(time, name, self._trajectories[run.request_id])
        self._reschedule(engine)

    def _chunk_over(self, time: float, name: str, trajectory: _Trajectory) -> None:
        job = trajectory.job
        self._scheduler.chunk_finished(job.request_id, trajectory.tokens)
        trajectory.context += trajectory.tokens
        trajectory.generated += trajectory.tokens
        trajectory.left -= trajectory.tokens
        trajectory.holder, trajectory.cached, trajectory.placed = name, trajectory.context, None
        if trajectory.left:
            self._submit(job.request_id)
            return
        trajectory.turn += 1
        if trajectory.turn < len(job.turns):
            self._at(time + job.tool_s[trajectory.turn - 1], self._tool_done, job.request_id)
            return
        self._scheduler.request_finished(job.request_id)
        self._siblings[job.group_id] += 1
        self._outcome.finished[job.request_id] = time
        del self._trajectories[job.request_id]

    def _tool_done(self, time: float, request_id: str, _: object) -> None:
        trajectory = self._trajectories[request_id]
        trajectory.context += trajectory.job.observation
        trajectory.left = trajectory.job.turns[trajectory.turn]
        self._submit(request_id)

    def _lost(self, time: float, name: str, _: object) -> None:
        engine = self._engines[name]
        engine.lose(time)
        engine.version += 1
        lost = self._scheduler.engine_lost(name)
        self._outcome.lost_chunks += len(lost)
        for request_id in lost:
            self._trajectories[request_id].placed = None
        for trajectory in self._trajectories.values():
            if trajectory.holder == name:
                trajectory.holder, trajectory.cached = None, 0

    def _joined(self, time: float, name: str, _: object) -> None:
        self._engines[name].advance_to(time)
        self._scheduler.engine_joined(name, self._slots, self._cost.kv_tokens)

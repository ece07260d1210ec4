"""The engines during one rollout: a scheduler, and the calls that are outstanding.

Each engine has at most one `pump` call outstanding: what it is to forget, what it is to start, and the wait for its
next finished chunks, in one round trip.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from megatron_pbsd.config import RolloutConfig
from megatron_pbsd.controller.failures import ComponentDied, DeadlineExpired
from megatron_pbsd.controller.gather import end_hung
from megatron_pbsd.controller.runtime import Client, Future
from megatron_pbsd.rollout.activity import Activity
from megatron_pbsd.rollout.drafting.exchange import Exchange
from megatron_pbsd.rollout.engine_set import EngineSet
from megatron_pbsd.rollout.engines.protocol import ChunkResult, EngineStatistics
from megatron_pbsd.rollout.episode import Episode
from megatron_pbsd.rollout.errors import RolloutError
from megatron_pbsd.rollout.scheduler import Assignment, Policy, Scheduler

PULL_ABOVE = 32
"""Contexts of more tokens have their KV moved: through shared memory that costs less than to compute them again."""


class Dispatcher:
    """statistics: of each engine, as the rollout begins."""

    def __init__(self, engines: EngineSet, client: Client, config: RolloutConfig, policy: Policy,
                 statistics: Mapping[str, EngineStatistics]):
        self._engines, self._client, self._config = engines, client, config
        self._scheduler = Scheduler(policy, PULL_ABOVE)
        self._episodes: dict[str, Episode] = {}
        self._work: dict[str, _Work] = {}
        self._outstanding: dict[str, _Call] = {}
        self._ran_at: dict[str, str] = {}
        self._read: dict[str, int] = {}
        self._exchange = Exchange() if config.speculation.enabled else None
        self.activity = Activity()
        self.moves = self.recomputed_tokens = self._placed = 0
        self._kv_tokens = max((s.kv_tokens for s in statistics.values()), default=0)
        for name in engines.handles:
            self._joined(name)

    def _joined(self, name: str) -> None:
        # Engines of a run are alike.
        self._work[name] = _Work()
        self._scheduler.engine_joined(name, self._config.slots, self._kv_tokens or None)

    def submit(self, episode: Episode) -> None:
        self._episodes[episode.request_id] = episode
        self._scheduler.submitted(episode.request_id, episode.group_id, episode.context_tokens, episode.room)

    def finish(self, episode: Episode) -> None:
        holder = self._scheduler.request_finished(episode.request_id)
        if holder is not None:
            self._work[holder].releases.append(episode.request_id)
        del self._episodes[episode.request_id]
        self.activity.ended()

    def next_results(self) -> list[ChunkResult]:
        """Give the engines their work, and wait until one of them returns finished chunks, or is found dead or hung,
        and then ended: there are none then."""
        self._change_engines()
        for assignment in self._scheduler.decisions():
            self._assign(assignment)
        for name in self._engines.handles:
            if name not in self._outstanding and self._scheduler.in_flight(name):
                self._pump(name)
        return self._received()

    def _received(self) -> list[ChunkResult]:
        """See `next_results`."""
        try:
            name = self._first_done()
            results = self._client.result(self._outstanding[name].future)
        except ComponentDied as death:
            self._lost(death)
            return []
        except DeadlineExpired as expired:
            for death in end_hung(self._client, expired, [call.future for call in self._outstanding.values()]):
                self._lost(death)
            return []
        call = self._outstanding.pop(name)
        self.activity.worked(name, call.start_ns, len(results))
        for result in results:
            self._finished(name, result)
        return results

    def stop(self) -> list[ChunkResult]:
        """End what is in flight: chunks that had ended, and what there is of the others, of finish reason 'abort'. They
        may be continued in another rollout."""
        interrupted = [self._engines.handles[name].observe("interrupt") for name in self._outstanding]
        results: list[ChunkResult] = []
        while self._outstanding:
            results += self._received()
        # An engine that is interrupted after its chunks had ended would interrupt its next rollout.
        self._client.wait(interrupted, len(interrupted), self._config.deadline_s)
        in_flight = {name: (self._scheduler.in_flight(name),) for name in self._engines.handles}
        for name, aborted in self._engines.ask("abort", in_flight).items():
            for result in aborted:
                self._finished(name, result)
            results += aborted
        return results

    def _change_engines(self) -> None:
        for handle in self._engines.arrivals():
            self._joined(handle.name)
        for name in self._engines.departures():
            self._work[name].leaving = True
            self._scheduler.engine_leaving(name)
        for name in [name for name, work in self._work.items() if work.leaving]:
            if not self._scheduler.in_flight(name):
                del self._work[name]
                self._engines.left(name)
        if not self._work:
            raise RolloutError(f"no engine is left for {len(self._episodes)} unfinished trajectories")

    def _assign(self, assignment: Assignment) -> None:
        request_id, last = assignment.request_id, self._ran_at.get(assignment.request_id)
        source = None
        if last is not None and last != assignment.engine:
            self.moves += 1
            if assignment.leaves is None or assignment.pull_tokens:
                source = last
        if assignment.leaves is not None:
            left = self._work[assignment.leaves]
            (left.releases if source is None else left.hand_overs).append(request_id)
        # What the scheduler has placed first is the most urgent.
        self._placed += 1
        self._work[assignment.engine].starts.append((request_id, assignment.max_tokens, source, -self._placed))

    def _pump(self, name: str) -> None:
        work = self._work[name]
        chunks = [self._episodes[request_id].next_chunk(*how) for request_id, *how in work.starts]
        if self._exchange is not None:
            chunks = [self._exchange.sent(name, chunk) for chunk in chunks]
        start_ns = time.time_ns()
        future = self._engines.handles[name].call("pump", chunks, work.releases, work.hand_overs)
        self._outstanding[name] = _Call(future, time.monotonic(), start_ns)
        self._work[name] = _Work(leaving=work.leaving)

    def _finished(self, name: str, result: ChunkResult) -> None:
        request_id = result.request_id
        self._scheduler.chunk_finished(request_id, len(result.tokens))
        if self._exchange is not None:
            self._exchange.returned(name, request_id, result.tokens)
        self.recomputed_tokens += max(0, self._read.get(request_id, 0) - result.cached_tokens)
        self._read[request_id] = self._episodes[request_id].context_tokens + len(result.tokens) - 1
        self._ran_at[request_id] = name

    def _lost(self, death: ComponentDied) -> None:
        """Its chunks wait again; what it had parked of finished ones may still be fetched."""
        self._engines.died(death)
        del self._work[death.name]
        self._outstanding.pop(death.name, None)
        self._scheduler.engine_lost(death.name)
        if self._exchange is not None:
            self._exchange.lost(death.name)

    def _first_done(self) -> str:
        """DeadlineExpired names the engines without a finished chunk for `deadline_s`, whatever others do meanwhile."""
        deadline_s = self._config.deadline_s
        calls = {name: call.future for name, call in self._outstanding.items()}
        while True:
            limit = time.monotonic() - deadline_s
            late = [call.future for call in self._outstanding.values() if call.since <= limit]
            if late and not self._client.wait(late, 1, 0.0)[0]:
                raise DeadlineExpired("rollout", deadline_s, [call.name for call in late], self._client.stacks(late))
            oldest = min(call.since for call in self._outstanding.values())
            done, _ = self._client.wait(list(calls.values()), 1, max(0.0, oldest - limit))
            if done:
                return next(name for name, future in calls.items() if future is done[0])

    def release(self) -> None:
        """Let the engines forget what is over, and what goes on in another rollout: its KV will be outdated."""
        left: dict[str, list[str]] = {name: [] for name in self._work}
        for request_id in self._episodes:
            if (name := self._ran_at.get(request_id)) in left:
                left[name].append(request_id)
        self._engines.ask("release", {
            name: (work.releases + work.hand_overs + left[name],) for name, work in self._work.items()})


@dataclass
class _Work:
    """What an engine's next call will tell it. starts: request, and of its chunk the most tokens, where its KV is
    parked, and the priority. leaving: there will be no more."""

    starts: list[tuple[str, int | None, str | None, int]] = field(default_factory=list)
    releases: list[str] = field(default_factory=list)
    hand_overs: list[str] = field(default_factory=list)
    leaving: bool = False


@dataclass(frozen=True)
class _Call:
    """since: time.monotonic. start_ns: time.time_ns."""

    future: Future
    since: float
    start_ns: int

"""Drives all engines through a rollout: episodes, scheduler and environment in one place.

Each engine is always either idle or inside one `pump` call, which brings it new chunks and comes back with ended
ones. Everything that arrives is handled at once, so a trajectory waits for nobody but its own engine.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from megatron_pbsd.config import RolloutConfig
from megatron_pbsd.controller.runtime import Call, DeadlineExpired, Handle, gather
from megatron_pbsd.environments import Environment
from megatron_pbsd.rollout.engines.protocol import Chunk, ChunkResult, Engine
from megatron_pbsd.rollout.episode import Episode, RolloutRequest
from megatron_pbsd.rollout.policies.least_loaded import LeastLoaded
from megatron_pbsd.rollout.scheduler import Scheduler
from megatron_pbsd.trajectory import Group


class EngineHost:
    """An engine as a component: adds the one call that a rollout needs, so that each round trip does all its work."""

    def __init__(self, build: Callable[..., Engine], *args: object, **kwargs: object):
        self._engine = build(*args, **kwargs)

    def pump(self, chunks: Sequence[Chunk], over: Sequence[str]) -> list[ChunkResult]:
        """Forget the KV of `over`, queue `chunks`, and work until something has ended."""
        self._engine.release(over)
        self._engine.submit(chunks)
        return self._engine.collect()

    def __getattr__(self, method: str):
        return getattr(self._engine, method)


class Coordinator:
    """engines: handles of EngineHosts. environment: builds the environment, here, where its index will be used."""

    def __init__(self, engines: Sequence[Handle], environment: Callable[[], Environment], config: RolloutConfig):
        self._engines = {handle.name: handle for handle in engines}
        self._environment, self._config = environment(), config
        self._progress = (0, 0)

    def progress(self) -> tuple[int, int]:
        """(finished, total) trajectories of the rollout under way; another thread may ask."""
        return self._progress

    def collect(self, requests: Sequence[RolloutRequest], prefix: str, seed: int, temperature: float,
                sink: Path) -> tuple[list[Group], dict[str, float]]:
        """Run every request to its end; groups come back in the order of the requests, whatever ended first.

        prefix:  of the trajectory ids, `{prefix}/{group}/{sample}`.
        sink:    JSONL file; each trajectory is written, unscored, as soon as it is over.

        Metrics: rollout/tokens_per_s, rollout/tokens, rollout/engine_idle (share of engine time).
        """
        started = time.perf_counter()
        session = _Session(self._engines, self._config)
        episodes = [
            [Episode(f"{prefix}/{g}/{i}", request, self._environment, self._config, seed, temperature)
             for i in range(request.samples)]
            for g, request in enumerate(requests)
        ]
        with sink.open("w", encoding="utf-8") as file:
            everyone = [episode for group in episodes for episode in group]
            for finished, episode in enumerate(session.run(everyone), start=1):
                self._progress = (finished, len(everyone))
                file.write(json.dumps(episode.trajectory().to_json()) + "\n")
                file.flush()
        groups = [Group(request.group_id, tuple(e.trajectory() for e in group))
                  for request, group in zip(requests, episodes, strict=True)]
        seconds = time.perf_counter() - started
        tokens = sum(t.generated for group in groups for t in group.trajectories)
        return groups, {
            "rollout/tokens": float(tokens),
            "rollout/tokens_per_s": tokens / seconds,
            "rollout/engine_idle": max(0.0, 1 - session.busy_s / (seconds * len(self._engines))),
        }


class _Session:
    """The state of one rollout."""

    def __init__(self, engines: dict[str, Handle], config: RolloutConfig):
        self._engines, self._config = engines, config
        self._scheduler = Scheduler(LeastLoaded())
        for name in engines:
            self._scheduler.engine_joined(name, config.slots)
        self._over: dict[str, list[str]] = {name: [] for name in engines}
        self._calls: dict[str, Call] = {}
        self._since: dict[str, float] = {}
        self.busy_s = 0.0

    def run(self, episodes: Sequence[Episode]) -> Iterator[Episode]:
        """Yields episodes as they finish."""
        by_id = {episode.trajectory_id: episode for episode in episodes}
        for episode in episodes:
            self._submit(episode)
        finished = 0
        while finished < len(by_id):
            self._pump(by_id)
            for result in self._arrived():
                episode = by_id[result.request_id]
                episode.advance(result)
                self._scheduler.chunk_finished(result.request_id)
                if not episode.finished:
                    self._submit(episode)
                    continue
                self._over[self._scheduler.request_finished(result.request_id)].append(result.request_id)
                finished += 1
                yield episode
        handles = list(self._engines.values())
        gather("rollout.release", handles, [h.call("release", self._over[h.name]) for h in handles],
               self._config.deadline_s)

    def _submit(self, episode: Episode) -> None:
        self._scheduler.submitted(episode.trajectory_id, episode.request.group_id, len(episode.context))

    def _pump(self, by_id: dict[str, Episode]) -> None:
        """Send every engine that is not inside a call what it should work on next."""
        available = set(self._engines) - set(self._calls)
        starting: dict[str, list[Chunk]] = {engine: [] for engine in available}
        for assignment in self._scheduler.decisions(available):
            starting[assignment.engine].append(by_id[assignment.request_id].next_chunk())
            if assignment.leaves is not None:
                self._over[assignment.leaves].append(assignment.request_id)
        for engine, chunks in starting.items():
            if self._scheduler.in_flight(engine):
                self._send(engine, chunks)

    def _send(self, engine: str, chunks: list[Chunk]) -> None:
        over, self._over[engine] = self._over[engine], []
        self._since[engine] = time.perf_counter()
        self._calls[engine] = self._engines[engine].call("pump", chunks, over)

    def _arrived(self) -> list[ChunkResult]:
        calls = {id(call): engine for engine, call in self._calls.items()}
        any_handle = next(iter(self._engines.values()))
        oldest = min(self._since[engine] for engine in self._calls)
        remaining = oldest + self._config.deadline_s - time.perf_counter()
        done, _ = any_handle.wait(list(self._calls.values()), max(0.0, remaining))
        if not done:
            raise self._expired(max(oldest, time.perf_counter() - self._config.deadline_s))
        results = []
        for call in done:
            engine = calls[id(call)]
            del self._calls[engine]
            self.busy_s += time.perf_counter() - self._since[engine]
            results += call.result()
        return results

    def _expired(self, limit: float) -> DeadlineExpired:
        hung = [engine for engine in self._calls if self._since[engine] <= limit]
        stacks = "\n".join(f"{engine}:\n{self._engines[engine].stacks()}" for engine in hung)
        return DeadlineExpired(f"phase 'rollout': no finished chunk from {', '.join(hung)} within rollout.deadline_s = "
                               f"{self._config.deadline_s:g}\n{stacks}")

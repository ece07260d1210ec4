"""Drives all engines and the environment from prompts to finished groups.

Each engine has at most one `pump` call outstanding: what it is to forget, what it is to start, and the wait for its
next finished chunks, in one round trip.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_pbsd.config import RolloutConfig, RunConfig
from megatron_pbsd.controller.failures import DeadlineExpired
from megatron_pbsd.controller.gather import gather
from megatron_pbsd.controller.runtime import Client, Future, Handle
from megatron_pbsd.environments import Environment, Task, build_environment
from megatron_pbsd.rollout.engines.protocol import ChunkResult, EngineStatistics
from megatron_pbsd.rollout.episode import Episode, EpisodeStart
from megatron_pbsd.rollout.errors import RolloutError
from megatron_pbsd.rollout.policies.least_loaded import LeastLoaded
from megatron_pbsd.rollout.scheduler import Assignment, Policy, Scheduler
from megatron_pbsd.rollout.sink import TrajectorySink
from megatron_pbsd.trajectory import Group, Trajectory


@dataclass(frozen=True)
class RolloutRequest:
    """`samples` trajectories of one task. `privileged_answer`: what the teacher's prompt discloses."""

    group_id: str
    task: Task
    samples: int
    privileged_answer: str


@dataclass(frozen=True)
class Progress:
    """Trajectories finished and asked for, tokens generated so far, of the present or latest `collect`."""

    finished: int
    total: int
    tokens: int


@dataclass(frozen=True)
class CollectStatistics:
    """engine_idle_share: part of the engines' wall time in which they computed nothing, 0 … 1.
    taken_up, taken_up_tokens: of the trajectories and generated tokens, those that were there before."""

    trajectories: int
    turns: int
    generated_tokens: int
    prefilled_tokens: int
    cached_tokens: int
    wall_seconds: float
    engine_idle_share: float
    taken_up: int = 0
    taken_up_tokens: int = 0

    @property
    def tokens_per_second(self) -> float:
        return (self.generated_tokens - self.taken_up_tokens) / self.wall_seconds


class Coordinator:
    """engines: handles of `EngineHost` components, the same for the coordinator's whole life. policy: makes the policy
    of each `collect`.

    `collect` is called from one thread; `progress` may be called from another at any time.
    """

    def __init__(
        self,
        engines: Sequence[Handle],
        environment: Environment,
        config: RolloutConfig,
        client: Client,
        policy: Callable[[], Policy] = LeastLoaded,
    ):
        self._engines = {handle.name: handle for handle in engines}
        self._environment, self._config, self._client, self._policy = environment, config, client, policy
        self._progress = Progress(0, 0, 0)
        self._statistics: CollectStatistics | None = None

    def progress(self) -> Progress:
        return self._progress

    def statistics(self) -> CollectStatistics | None:
        """Of the latest `collect` that returned."""
        return self._statistics

    def collect(
        self,
        requests: Sequence[RolloutRequest],
        *,
        step: int,
        seed: int,
        temperature: float,
        sink: str | Path | None = None,
        routed_experts: bool = False,
        finished: Sequence[Trajectory] = (),
    ) -> list[Group]:
        """Groups in the order of `requests`, samples in order, whatever the order they finish in.

        Trajectory ids, the keys of sampling, are `{step}/{group_id}/{sample}`. Each trajectory is appended to `sink` as
        soon as it is finished. `routed_experts`: keep which experts read each token, if the model has any.
        `finished`: trajectories of such a call that did not end; those that are asked for again are not generated
        again. That is the same rollout only if sampling depends on nothing but seed and trajectory id.
        ComponentDied when an engine dies, DeadlineExpired when one has finished no chunk within `rollout.deadline_s`;
        the engines are then in an unknown state. RolloutError when a prompt is too long.
        """
        began, before = time.monotonic(), self._engine_statistics()
        starts = {request.group_id: self._starts(request, step, seed, temperature, routed_experts)
                  for request in requests}
        if len(starts) < len(requests):
            ids = [request.group_id for request in requests]
            raise RolloutError(f"group ids must differ; repeated are {sorted({i for i in ids if ids.count(i) > 1})}")
        done = _asked_again(finished, [start for group in starts.values() for start in group])
        episodes = {start.trajectory_id: Episode(start, self._config)
                    for group in starts.values() for start in group if start.trajectory_id not in done}
        with TrajectorySink(sink) as kept:
            self._run(list(episodes.values()), kept, len(done))
        made = done | {name: episode.trajectory() for name, episode in episodes.items()}
        groups = [Group(group_id, tuple(made[start.trajectory_id] for start in group))
                  for group_id, group in starts.items()]
        self._statistics = summarised(
            groups, list(done.values()), before, self._engine_statistics(), time.monotonic() - began)
        return groups

    def _starts(
        self, request: RolloutRequest, step: int, seed: int, temperature: float, routed_experts: bool
    ) -> list[EpisodeStart]:
        environment = self._environment
        prompt = tuple(environment.prompt(request.task))
        privileged = tuple(environment.privileged_prompt(request.task, request.privileged_answer))
        return [
            EpisodeStart(f"{step}/{request.group_id}/{sample}", request.group_id, request.task, prompt, privileged,
                         seed, temperature, tuple(environment.stop_token_ids), routed_experts)
            for sample in range(request.samples)]

    def _run(self, episodes: Sequence[Episode], sink: TrajectorySink, done: int) -> None:
        """done: how many further trajectories need no running."""
        pool = Pool(self._engines, self._client, self._config, self._policy())
        total = len(episodes) + done
        self._progress = Progress(done, total, 0)
        running = {episode.request_id: episode for episode in episodes}
        for episode in episodes:
            pool.submit(episode)
        while running:
            for result in pool.next_results():
                episode = running[result.request_id]
                episode.advance(result, self._environment)
                if episode.finished:
                    pool.finish(episode)
                    sink.write(episode.trajectory())
                    del running[result.request_id]
                else:
                    pool.submit(episode)
                self._progress = Progress(
                    total - len(running), total, self._progress.tokens + len(result.tokens))
        pool.release()

    def _engine_statistics(self) -> list[EngineStatistics]:
        return gather(self._client, [handle.call("statistics") for handle in self._engines.values()],
                      phase="rollout.statistics", deadline_s=self._config.deadline_s)


def _asked_again(finished: Sequence[Trajectory], starts: Sequence[EpisodeStart]) -> dict[str, Trajectory]:
    """By id, those of `finished` that begin as one of `starts` does."""
    by_id = {start.trajectory_id: start for start in starts}
    return {t.trajectory_id: t for t in finished
            if (start := by_id.get(t.trajectory_id)) is not None and start.task.task_id == t.task_id
            and (start.prompt, start.privileged_prompt) == (t.prompt, t.privileged_prompt)}


def build_coordinator(engines: Sequence[Handle], config: RunConfig, client: Client) -> Coordinator:
    """In the coordinator's own process, where the environment's index will be used."""
    environment = build_environment(config.environment, config.model.path)
    return Coordinator(engines, environment, config.rollout, client)


class Pool:
    """The engines during one collection: a scheduler, and the calls that are outstanding."""

    def __init__(self, engines: dict[str, Handle], client: Client, config: RolloutConfig, policy: Policy):
        self._engines, self._client, self._deadline_s = engines, client, config.deadline_s
        self._scheduler = Scheduler(policy)
        for name in engines:
            self._scheduler.engine_joined(name, config.slots)
        self._episodes: dict[str, Episode] = {}
        self._to_start: dict[str, list[Assignment]] = {name: [] for name in engines}
        self._to_release: dict[str, list[str]] = {name: [] for name in engines}
        self._outstanding: dict[str, tuple[Future, float]] = {}

    def submit(self, episode: Episode) -> None:
        self._episodes[episode.request_id] = episode
        self._scheduler.submitted(episode.request_id, episode.group_id, episode.context_tokens, episode.room)

    def finish(self, episode: Episode) -> None:
        holder = self._scheduler.request_finished(episode.request_id)
        self._to_release[holder].append(episode.request_id)
        del self._episodes[episode.request_id]

    def next_results(self) -> list[ChunkResult]:
        """Give the engines their work, and wait until one of them returns finished chunks."""
        for assignment in self._scheduler.decisions():
            self._to_start[assignment.engine].append(assignment)
            if assignment.leaves is not None:
                self._to_release[assignment.leaves].append(assignment.request_id)
        for name, handle in self._engines.items():
            if name not in self._outstanding and self._scheduler.in_flight(name):
                chunks = [self._episodes[a.request_id].next_chunk(a.max_tokens) for a in self._to_start[name]]
                call = handle.call("pump", chunks, self._to_release[name])
                self._outstanding[name] = call, time.monotonic()
                self._to_start[name], self._to_release[name] = [], []
        name = self._first_done()
        call, _ = self._outstanding.pop(name)
        results = self._client.result(call)
        for result in results:
            self._scheduler.chunk_finished(result.request_id, len(result.tokens))
        return results

    def _first_done(self) -> str:
        oldest = min(since for _, since in self._outstanding.values())
        calls = [call for call, _ in self._outstanding.values()]
        done, _ = self._client.wait(calls, 1, max(0.0, oldest + self._deadline_s - time.monotonic()))
        if done:
            return next(name for name, (call, _) in self._outstanding.items() if call is done[0])
        limit = max(oldest, time.monotonic() - self._deadline_s)
        late = [call for call, since in self._outstanding.values() if since <= limit]
        raise DeadlineExpired("rollout", self._deadline_s, [call.name for call in late], self._client.stacks(late))

    def release(self) -> None:
        """Let the engines forget what is over."""
        gather(self._client, [handle.call("release", self._to_release[name]) for name, handle in self._engines.items()],
               phase="rollout.release", deadline_s=self._deadline_s)


def summarised(
    groups: Sequence[Group],
    taken_up: Sequence[Trajectory],
    before: Sequence[EngineStatistics],
    after: Sequence[EngineStatistics],
    wall_seconds: float,
) -> CollectStatistics:
    def total(counter: str) -> float:
        return sum(getattr(b, counter) - getattr(a, counter) for a, b in zip(before, after, strict=True))

    trajectories: list[Trajectory] = [t for group in groups for t in group.trajectories]
    return CollectStatistics(
        trajectories=len(trajectories),
        turns=sum(len(t.turns) for t in trajectories),
        generated_tokens=sum(t.generated for t in trajectories),
        prefilled_tokens=int(total("prefilled_tokens")),
        cached_tokens=int(total("cached_tokens")),
        wall_seconds=wall_seconds,
        engine_idle_share=max(0.0, 1.0 - total("busy_seconds") / (wall_seconds * len(after))),
        taken_up=len(taken_up),
        taken_up_tokens=sum(t.generated for t in taken_up),
    )

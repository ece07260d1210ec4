"""Drives all engines and the environment from prompts to finished groups."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from megatron_pbsd.config import RolloutConfig, RunConfig
from megatron_pbsd.controller.failures import ComponentDied
from megatron_pbsd.controller.runtime import Client, Handle
from megatron_pbsd.environments import Environment, Task, build_environment
from megatron_pbsd.rollout.activity import EngineSpan
from megatron_pbsd.rollout.dispatcher import Dispatcher
from megatron_pbsd.rollout.engine_set import EngineSet
from megatron_pbsd.rollout.engines.protocol import EngineStatistics, KVCounters
from megatron_pbsd.rollout.episode import Episode, EpisodeStart
from megatron_pbsd.rollout.errors import RolloutError
from megatron_pbsd.rollout.length_history import LengthHistory
from megatron_pbsd.rollout.policies.configured import configured_policy
from megatron_pbsd.rollout.policies.context_aware import ContextAware
from megatron_pbsd.rollout.policies.longest_remaining import LongestRemaining
from megatron_pbsd.rollout.scheduler import Policy
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
    """Trajectories finished and asked for, tokens generated so far, of the present or latest `collect`.

    deaths: of engines, in all calls of `collect` so far; those that hung and were ended are among them.
    """

    finished: int
    total: int
    tokens: int
    deaths: tuple[ComponentDied, ...] = ()


@dataclass(frozen=True)
class CollectStatistics:
    """engine_idle_share: part of the engines' wall time in which they computed nothing, 0 … 1.
    taken_up, taken_up_tokens: of the trajectories and generated tokens, those that were there before.
    tail_seconds: time spent on nothing but the last tenth of the trajectories.
    engine_steps: forward passes of the engine that had the most.
    moves: chunks that ran on another engine than their trajectory's last.
    recomputed_tokens: whose KV an earlier chunk of the trajectory had computed, but was not found again.
    kv: what became of KV, all engines together. spans: when engines had work.
    drafts, drafted_tokens, accepted_tokens: see `protocol.EngineStatistics`.
    deaths: of engines without which the rollout went on; nothing of what they counted is in here.
    predicted_lengths: see `length_context.Calibration`; empty under policies that predict none."""

    trajectories: int
    turns: int
    generated_tokens: int
    prefilled_tokens: int
    cached_tokens: int
    wall_seconds: float
    engine_idle_share: float
    taken_up: int = 0
    taken_up_tokens: int = 0
    tail_seconds: float = 0.0
    engine_steps: int = 0
    moves: int = 0
    recomputed_tokens: int = 0
    kv: KVCounters = field(default_factory=KVCounters)
    drafts: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    spans: tuple[EngineSpan, ...] = ()
    deaths: tuple[ComponentDied, ...] = ()
    predicted_lengths: Mapping[str, float] = field(default_factory=dict)

    @property
    def tokens_per_second(self) -> float:
        return (self.generated_tokens - self.taken_up_tokens) / self.wall_seconds


class Coordinator:
    """engines: handles of `EngineHost` components to begin with. policy: makes the policy of each `collect`, in place
    of the configured one.

    `collect` is called from one thread; `progress`, `join` and `leave` may be called from another at any time.
    """

    def __init__(
        self,
        engines: Sequence[Handle],
        environment: Environment,
        config: RolloutConfig,
        client: Client,
        policy: Callable[[], Policy] | None = None,
    ):
        self._engines = EngineSet(engines, client, config.deadline_s)
        self._environment, self._config, self._client, self._policy = environment, config, client, policy
        self._history = LengthHistory()
        self._progress = Progress(0, 0, 0)
        self._statistics: CollectStatistics | None = None

    def join(self, engine: Handle) -> None:
        """One more engine, with the weights of the others, from the next finished chunk on."""
        self._engines.join(engine)

    def leave(self, engine: str) -> None:
        """It gets no more chunks; those it has are finished. RolloutError in `collect` if there is no such engine."""
        self._engines.leave(engine)

    def progress(self) -> Progress:
        return replace(self._progress, deaths=tuple(self._engines.deaths))

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
        An engine that has finished no chunk within `rollout.deadline_s` is ended. What an engine that dies had begun,
        others do, from the last finished chunks on. ComponentDied when the last one dies; ComponentHung, which is also
        a DeadlineExpired, when it was ended; DeadlineExpired when it has no process that could be ended. RolloutError
        when a prompt is too long.
        """
        began, earlier_deaths = time.monotonic(), len(self._engines.deaths)
        self._engines.arrivals()
        before = self._engines.ask("statistics")
        starts = {request.group_id: self._starts(request, step, seed, temperature, routed_experts)
                  for request in requests}
        if len(starts) < len(requests):
            ids = [request.group_id for request in requests]
            raise RolloutError(f"group ids must differ; repeated are {sorted({i for i in ids if ids.count(i) > 1})}")
        done = _asked_again(finished, [start for group in starts.values() for start in group])
        episodes = {start.trajectory_id: Episode(start, self._config)
                    for group in starts.values() for start in group if start.trajectory_id not in done}
        policy = self._make_policy(requests)
        dispatcher = Dispatcher(self._engines, self._client, self._config, policy, before)
        with TrajectorySink(sink) as kept:
            self._run(dispatcher, list(episodes.values()), kept, len(done))
        made = done | {name: episode.trajectory() for name, episode in episodes.items()}
        groups = [Group(group_id, tuple(made[start.trajectory_id] for start in group))
                  for group_id, group in starts.items()]
        for request, group in zip(requests, groups, strict=True):
            self._history.asked(request.task.task_id, [t.generated for t in group.trajectories])
        after = self._engines.ask("statistics")
        deaths = tuple(self._engines.deaths[earlier_deaths:])
        for death in deaths:
            before.pop(death.name, None)
        self._statistics = replace(
            summarised(groups, list(done.values()), before, after, time.monotonic() - began),
            moves=dispatcher.moves, recomputed_tokens=dispatcher.recomputed_tokens,
            tail_seconds=dispatcher.activity.tail_seconds, spans=dispatcher.activity.spans,
            deaths=deaths, predicted_lengths=_calibration(policy))
        return groups

    def _make_policy(self, requests: Sequence[RolloutRequest]) -> Policy:
        if self._policy is not None:
            return self._policy()
        tasks = {request.group_id: request.task.task_id for request in requests}
        return configured_policy(self._config, tasks, self._history)

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

    def _run(self, dispatcher: Dispatcher, episodes: Sequence[Episode], sink: TrajectorySink, done: int) -> None:
        """done: how many further trajectories need no running."""
        total = len(episodes) + done
        self._progress = Progress(done, total, 0)
        running = {episode.request_id: episode for episode in episodes}
        for episode in episodes:
            dispatcher.submit(episode)
        while running:
            for result in dispatcher.next_results():
                episode = running[result.request_id]
                episode.advance(result, self._environment)
                if episode.finished:
                    dispatcher.finish(episode)
                    sink.write(episode.trajectory())
                    del running[result.request_id]
                else:
                    dispatcher.submit(episode)
                self._progress = replace(
                    self._progress, finished=total - len(running), tokens=self._progress.tokens + len(result.tokens))
        dispatcher.release()


def _calibration(policy: Policy) -> dict[str, float]:
    return policy.lengths.calibration.metrics() if isinstance(policy, ContextAware | LongestRemaining) else {}


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


def summarised(
    groups: Sequence[Group],
    taken_up: Sequence[Trajectory],
    before: Mapping[str, EngineStatistics],
    after: Mapping[str, EngineStatistics],
    wall_seconds: float,
) -> CollectStatistics:
    """An engine that is not in `before` has started since; one that is not in `after` is gone."""
    def made(name: str, counter: str) -> float:
        return getattr(after[name], counter) - (getattr(before[name], counter) if name in before else 0)

    def total(counter: str) -> float:
        return sum(made(name, counter) for name in after)

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
        **{counter: int(total(counter)) for counter in ("drafts", "drafted_tokens", "accepted_tokens")},
        engine_steps=int(max(made(name, "decode_steps") for name in after)),
        kv=kv_counters([s.kv for s in after.values()], [s.kv for name, s in before.items() if name in after]),
    )


def kv_counters(after: Sequence[KVCounters], before: Sequence[KVCounters]) -> KVCounters:
    """What was counted in between, all engines together; gauges as they are after."""
    def total(counter: str, of: Sequence[KVCounters]) -> int:
        return sum(getattr(counters, counter) for counters in of)

    counted = {c.name: total(c.name, after) - total(c.name, before) for c in fields(KVCounters)}
    return replace(KVCounters(**counted), bytes=total("bytes", after))

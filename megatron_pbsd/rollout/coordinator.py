"""Drives all engines and the environment from prompts to finished groups."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from megatron_pbsd.config import RolloutConfig, RunConfig
from megatron_pbsd.controller.failures import ComponentDied
from megatron_pbsd.controller.runtime import Client, Handle
from megatron_pbsd.environments import Environment, Task, build_environment
from megatron_pbsd.rollout.activity import EngineSpan
from megatron_pbsd.rollout.dispatcher import Dispatcher
from megatron_pbsd.rollout.engine_set import EngineSet
from megatron_pbsd.rollout.engines.protocol import ChunkResult, EngineStatistics, KVCounters
from megatron_pbsd.rollout.episode import Episode, EpisodeStart
from megatron_pbsd.rollout.errors import RolloutError
from megatron_pbsd.rollout.length_history import LengthHistory
from megatron_pbsd.rollout.policies.configured import configured_policy
from megatron_pbsd.rollout.policies.context_aware import ContextAware
from megatron_pbsd.rollout.policies.first import First
from megatron_pbsd.rollout.policies.longest_remaining import LongestRemaining
from megatron_pbsd.rollout.quota import Quota, due
from megatron_pbsd.rollout.request import Member, RolloutRequest, Started, Unfinished
from megatron_pbsd.rollout.scheduler import Policy
from megatron_pbsd.rollout.sink import TrajectorySink
from megatron_pbsd.trajectory import Group, Trajectory


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
    trajectories, turns: of the groups that were made. generated_tokens: of these and of what was left, without what
    was carried.
    taken_up, taken_up_tokens: of the trajectories and generated tokens, those that were there before, not carried.
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
        self._left: list[Started] = []

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

    def left(self) -> list[Started]:
        """Groups that the latest `collect` that returned began, or went on with, and did not return."""
        return self._left

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
        carried: Sequence[Started] = (),
        wanted: int | None = None,
    ) -> list[Group]:
        """Groups in the order of `carried` and then `requests`, samples in order, whatever the order they finish in.

        wanted:    ends as soon as so many groups are complete, and those of `carried` that `rollout.max_staleness` will
                   not let the next step train on; None: when all are. `left` has the others.
        carried:   what such a call of an earlier step left. It goes on first, under the weights that there are now.
        sink:      each trajectory is appended to this file as soon as it is finished.
        finished:  trajectories of such a call that did not end; those that are asked for again are not generated again.
                   That is the same rollout only if sampling depends on nothing but seed and trajectory id.
        routed_experts:  keep which experts read each token, if the model has any.

        Trajectory ids, the keys of sampling, are `{step}/{group_id}/{sample}` with the step that asked.
        An engine that has finished no chunk within `rollout.deadline_s` is ended. What an engine that dies had begun,
        others do, from the last finished chunks on. ComponentDied when the last one dies; ComponentHung, which is also
        a DeadlineExpired, when it was ended; DeadlineExpired when it has no process that could be ended. RolloutError
        when a prompt is too long.
        """
        began, earlier_deaths = time.monotonic(), len(self._engines.deaths)
        self._engines.arrivals()
        before = self._engines.ask("statistics")
        groups = with_finished([*carried, *(self._started(request, step) for request in requests)], finished)
        ids = [group.group_id for group in groups]
        if repeated := sorted({i for i in ids if ids.count(i) > 1}):
            raise RolloutError(f"group ids must differ; repeated are {repeated}")
        must = due(carried, step - 1, self._config.max_staleness) if wanted is not None else frozenset()
        quota = Quota({group.group_id: len(group.unfinished) for group in groups}, wanted, must)
        sampling = (seed, temperature, tuple(self._environment.stop_token_ids), routed_experts)
        episodes = {begun.trajectory_id: Episode(start_of(begun, group.request.task, *sampling), self._config, begun)
                    for group in sorted(groups, key=lambda group: group.group_id not in must)
                    for begun in group.unfinished}
        policy = self._make_policy([group.request for group in groups])
        first = First(policy, [group.group_id for group in carried]) if carried else policy
        dispatcher = Dispatcher(self._engines, self._client, self._config, first, before)
        with TrajectorySink(sink) as kept:
            self._run(dispatcher, list(episodes.values()), kept, sum(len(group.members) for group in groups), quota)
        ended = [with_progress(group, episodes) for group in groups]
        made = self._divided(ended, quota.chosen)
        after = self._engines.ask("statistics")
        deaths = tuple(self._engines.deaths[earlier_deaths:])
        for death in deaths:
            before.pop(death.name, None)
        self._statistics = replace(
            summarised(made, before, after, time.monotonic() - began),
            generated_tokens=tokens_of(ended) - tokens_of(carried),
            taken_up_tokens=tokens_of(groups) - tokens_of(carried),
            taken_up=sum(len(group.finished) for group in groups) - sum(len(group.finished) for group in carried),
            moves=dispatcher.moves, recomputed_tokens=dispatcher.recomputed_tokens,
            tail_seconds=dispatcher.activity.tail_seconds, spans=dispatcher.activity.spans,
            deaths=deaths, predicted_lengths=_calibration(policy))
        return made

    def _divided(self, groups: Sequence[Started], chosen: Collection[str]) -> list[Group]:
        """Those that are chosen, which are complete; the others are `left`."""
        self._left = [group for group in groups if group.group_id not in chosen]
        taken = [group for group in groups if group.group_id in chosen]
        for group in taken:
            self._history.asked(group.request.task.task_id, [t.generated for t in group.finished])
        return [Group(group.group_id, tuple(group.finished)) for group in taken]

    def _make_policy(self, requests: Sequence[RolloutRequest]) -> Policy:
        if self._policy is not None:
            return self._policy()
        tasks = {request.group_id: request.task.task_id for request in requests}
        return configured_policy(self._config, tasks, self._history)

    def _started(self, request: RolloutRequest, step: int) -> Started:
        """A new group, of which nothing has been generated."""
        prompt = tuple(self._environment.prompt(request.task))
        privileged = tuple(self._environment.privileged_prompt(request.task, request.privileged_answer))
        return Started(request, tuple(
            Unfinished(Trajectory(f"{step}/{request.group_id}/{sample}", request.group_id, request.task.task_id, prompt,
                                  privileged, ()))
            for sample in range(request.samples)))

    def _run(self, dispatcher: Dispatcher, episodes: Sequence[Episode], sink: TrajectorySink, total: int,
             quota: Quota) -> None:
        """total: trajectories, those that need no running included."""
        running = {episode.request_id: episode for episode in episodes}
        self._progress = Progress(total - len(running), total, 0)

        def take_in(results: Sequence[ChunkResult]) -> Iterator[Episode]:
            """What has ended; yields the episodes that go on."""
            for result in results:
                episode = running[result.request_id]
                episode.advance(result, self._environment)
                if episode.finished:
                    dispatcher.finish(episode)
                    sink.write(episode.trajectory())
                    quota.finished(episode.group_id)
                    del running[result.request_id]
                else:
                    yield episode
                self._progress = replace(
                    self._progress, finished=total - len(running), tokens=self._progress.tokens + len(result.tokens))

        for episode in episodes:
            dispatcher.submit(episode)
        while not quota.reached:
            for episode in take_in(dispatcher.next_results()):
                dispatcher.submit(episode)
        if running:
            list(take_in(dispatcher.stop()))
        dispatcher.release()


def _calibration(policy: Policy) -> dict[str, float]:
    return policy.lengths.calibration.metrics() if isinstance(policy, ContextAware | LongestRemaining) else {}


def with_finished(groups: Sequence[Started], finished: Sequence[Trajectory]) -> list[Started]:
    """The groups, with those of `finished` that begin with what an unfinished member has in that one's place."""
    known = {trajectory.trajectory_id: trajectory for trajectory in finished}

    def ended(group: Started, member: Member) -> Member:
        found = known.get(member.trajectory_id)
        if isinstance(member, Trajectory) or found is None:
            return member
        begun, there = member.trajectory, (*member.trajectory.continuation, *member.tokens)
        same = (begun.task_id, begun.prompt, begun.privileged_prompt, there) == (
            found.task_id, found.prompt, found.privileged_prompt, found.continuation[: len(there)])
        return found if same else member

    return [group.with_members(ended(group, member) for member in group.members) for group in groups]


def with_progress(group: Started, episodes: Mapping[str, Episode]) -> Started:
    """The group as it is after its episodes have run."""
    def now(member: Member) -> Member:
        episode = episodes.get(member.trajectory_id)
        if episode is None:
            return member
        return episode.trajectory() if episode.finished else episode.unfinished()

    return group.with_members(map(now, group.members))


def tokens_of(groups: Sequence[Started]) -> int:
    return sum(group.generated for group in groups)


def start_of(begun: Unfinished, task: Task, seed: int, temperature: float, stop_token_ids: tuple[int, ...],
             routed_experts: bool) -> EpisodeStart:
    trajectory = begun.trajectory
    return EpisodeStart(trajectory.trajectory_id, trajectory.group_id, task, trajectory.prompt,
                        trajectory.privileged_prompt, seed, temperature, stop_token_ids, routed_experts)


def build_coordinator(engines: Sequence[Handle], config: RunConfig, client: Client) -> Coordinator:
    """In the coordinator's own process, where the environment's index will be used."""
    environment = build_environment(config.environment, config.model.path)
    return Coordinator(engines, environment, config.rollout, client)


def summarised(
    groups: Sequence[Group],
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

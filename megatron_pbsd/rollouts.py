"""Rollouts and publications as the driver sees them: engines that die in one are started anew."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from megatron_pbsd.config import RunConfig
from megatron_pbsd.controller.failures import ComponentDied
from megatron_pbsd.controller.runtime import Handle, Runtime
from megatron_pbsd.handover import HandOver
from megatron_pbsd.observability.recorder import Recorder
from megatron_pbsd.observability.records import TRAJECTORIES
from megatron_pbsd.prompts import Stream
from megatron_pbsd.resharding.publication import Publisher
from megatron_pbsd.rollout.coordinator import CollectStatistics
from megatron_pbsd.rollout.engine_group import EngineGroup
from megatron_pbsd.rollout.request import RolloutRequest, Started
from megatron_pbsd.rollout.sink import read_trajectories, taken_up
from megatron_pbsd.trajectory import Group, Trajectory

POLL_S = 0.5
LONGEST_BACK_OFF_S = 60.0


class Collected(NamedTuple):
    """groups: that are complete. left: what `Coordinator.left` has."""

    groups: list[Group]
    statistics: CollectStatistics
    left: Sequence[Started] = ()


class Rollout:
    """The coordinator as the driver sees it: blocks until the groups are there, and shows progress meanwhile.

    publisher: whose weights the engines have.
    """

    def __init__(self, runtime: Runtime, coordinator: Handle, config: RunConfig, recorder: Recorder,
                 publisher: Publisher, engines: EngineGroup, hand_over: HandOver):
        self._runtime, self._coordinator, self._config, self._recorder = runtime, coordinator, config, recorder
        self._publisher, self._engines, self._hand_over = publisher, engines, hand_over
        self._restarts = config.rollout.engine_restarts
        self._deaths = 0
        self._restarted = Counter[str]()
        self._taken_up: list[Trajectory] = []
        self.stream = Stream()
        """Where the run is in its prompts if it goes on from the weights that the engines have."""

    def collect(self, requests: Sequence[RolloutRequest], step: int, *, temperature: float | None = None,
                kind: str = "step", attempt: int = 0, carried: Sequence[Started] = (),
                wanted: int | None = None) -> Collected:
        """Unscored groups in the order of `carried` and `requests`, and what the engines did. carried, wanted: see
        `Coordinator.collect`.

        Finished trajectories are in `trajectories/<kind>_<step>.unscored.jsonl` until a rollout begins that is not a
        further attempt of the same step. What a run that died had finished of this rollout, with the same weights, is
        not generated again.
        """
        self._despite_deaths(self._hand_over.rollout, restore=True)
        sink = self._recorder.folder / TRAJECTORIES / f"{kind}_{step:06d}.unscored.jsonl"
        sampling = {
            "seed": self._config.seed,
            "routed_experts": self._config.learner.moe.routing_replay and kind == "step",
            "temperature": self._config.rollout.temperature if temperature is None else temperature}
        if attempt == 0:
            self.discard_unscored(but=sink.stem)
            self._taken_up = taken_up(sink, self._origin(sampling))
        arguments = {"step": step, "sink": sink.resolve(), "carried": carried, "wanted": wanted, **sampling}
        groups = self._collect(requests, finished=self._taken_up, **arguments)
        while groups is None:
            groups = self._collect(requests, finished=read_trajectories(sink), **arguments)
        statistics = self._runtime.result(self._coordinator.call("statistics"))
        for span in statistics.spans:
            self._recorder.lane(span.engine, kind, span.start_ns, span.end_ns, step=step, chunks=span.chunks)
        left = self._runtime.result(self._coordinator.call("left"))
        return Collected(groups, statistics, left)

    def _collect(self, requests: Sequence[RolloutRequest], **arguments: Any) -> list[Group] | None:
        """Engines that die in it are started anew; None when that was so of all."""
        call, done = self._coordinator.call("collect", requests, **arguments), []
        while not done:
            # The coordinator has a deadline for each engine call; here only its own death can be news, and engines'.
            done, _ = self._runtime.wait([call], timeout=POLL_S)
            progress = self._runtime.result(self._coordinator.observe("progress"))
            self._recorder.rollout_progress(progress.finished, progress.total)
            for death in progress.deaths[self._deaths:]:
                self._restart(death)
            self._deaths = len(progress.deaths)
        try:
            return self._runtime.result(call)
        except ComponentDied as death:
            if death.name not in self._engines.names:
                raise
            return None

    def publish(self, version: int, stream: Stream) -> dict[str, float]:
        """See `Publisher.publish`. Engines that have died since the last rollout, or hang, are started anew. stream:
        where the run is in its prompts."""
        def publish() -> dict[str, float]:
            self._hand_over.publish()
            return self._publisher.publish(version)

        self._despite_deaths(self._wake_weights, restore=False)
        metrics = self._despite_deaths(publish, restore=False)
        self.stream = stream
        return metrics

    def _wake_weights(self) -> None:
        """Where engines' weights slept they get what was published last, if the transport keeps that, before the
        learner overwrites it: if it is lost in the middle of that, nobody else has them."""
        if self._hand_over.publish() and self._publisher.published is not None and self._publisher.keeps:
            for name in self._engines.names:
                self._publisher.restore(name)

    def _despite_deaths(self, act: Callable[[], Any], restore: bool) -> Any:
        """Again and again until no engine dies in it; those that do are started anew."""
        while True:
            try:
                return act()
            except ComponentDied as death:
                if death.name not in self._engines.names:
                    raise
                self._restart(death, restore)

    def _restart(self, death: ComponentDied, restore: bool = True) -> None:
        """Raises `death` when there have been too many. restore: give the engine the weights that the others have."""
        if not self._restarts:
            raise death
        self._restarts -= 1
        wait_s = back_off_s(self._restarted[death.name])
        self._restarted[death.name] += 1
        when = f" in {wait_s:g} s" if wait_s else ""
        print(f"pbsd: {death.name} died: {death.cause}\npbsd: it is started anew{when}, "
              f"which may happen {self._restarts} more times (rollout.engine_restarts)", file=sys.stderr)
        time.sleep(wait_s)
        try:
            handle = self._engines.restart(death.name)
            if restore:
                self._publisher.restore(death.name)
        except ComponentDied as again:
            return self._restart(again, restore)
        self._runtime.result(self._coordinator.observe("join", handle))

    def _origin(self, sampling: Mapping[str, Any]) -> str:
        """All that decides how trajectories turn out, besides their prompts, which they have with them."""
        limits = self._config.rollout.model_dump(include={"max_turns", "max_turn_tokens", "max_context"})
        return json.dumps({"weights": self._publisher.published.digest, **sampling, **limits,
                           "environment": self._config.environment.model_dump(mode="json")}, sort_keys=True)

    def discard_unscored(self, but: str = "") -> None:
        """What the last rollout wrote has since been recorded with its scores."""
        for path in (self._recorder.folder / TRAJECTORIES).glob("*.unscored.*"):
            if path.stem != but:
                path.unlink()


def back_off_s(restarts: int) -> float:
    """How long an engine that has been started anew so often is not started again: what ended it may pass."""
    return min(2.0 ** (restarts - 1), LONGEST_BACK_OFF_S) if restarts else 0.0

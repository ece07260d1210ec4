"""All engines as one, between rollouts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_pbsd.controller.failures import ComponentDied, DeadlineExpired
from megatron_pbsd.controller.gather import end_hung
from megatron_pbsd.controller.group import Group
from megatron_pbsd.controller.runtime import Future, Handle, Machine, Runtime
from megatron_pbsd.rollout.engines.host import EngineHost
from megatron_pbsd.rollout.engines.protocol import EngineStatistics
from megatron_pbsd.rollout.engines.sglang.lifeline import Meeting

if TYPE_CHECKING:
    from megatron_pbsd.platform.usage import MemoryUse
    from megatron_pbsd.resharding.manifest import WeightsManifest


class EngineGroup(Group):
    """Lists hold one entry per engine. See `rollout.engines.protocol.Engine`."""

    kind = "engines"
    _start: Callable[[str], list[Handle]]

    @classmethod
    def spawn(
        cls, runtime: Runtime, factory: Callable[..., Any], *, count: int, deadline_s: float,
        by_machine: Callable[[Machine], dict[str, Any]] = lambda machine: {},
        member: Callable[..., Any] | None = None, **arguments: Any
    ) -> EngineGroup:
        """Start `factory(name=..., **arguments)` `count` times. Does not wait for them: see `ready`.

        by_machine: further arguments, for an engine on this one. member: for each further machine of an engine the same
        with `number=...`, from 1; both are then told with `meeting=...` where they come together.
        """
        def start(name: str) -> list[Handle]:
            (first, *further), machine, meeting = runtime.parts(name), runtime.machine(name), {}
            if further:
                meeting = {"meeting": Meeting(machine.address, machine.free_port(), 1 + len(further))}
            engine = runtime.spawn(
                first, EngineHost, factory, name=first, **by_machine(machine), **meeting, **arguments)
            return [engine, *(
                runtime.spawn(part, member, name=part, number=number, **by_machine(runtime.machine(part)), **meeting,
                              **arguments) for number, part in enumerate(further, start=1))]

        started = [start(f"engine-{i}") for i in range(count)]
        group = cls(runtime, [engine for engine, *_ in started], deadline_s)
        group._start, group._members = start, {engine.name: members for engine, *members in started}
        return group

    def __init__(self, runtime: Runtime, handles: Sequence[Handle], deadline_s: float):
        super().__init__(runtime, handles, deadline_s)
        self._hung: dict[str, ComponentDied] = {}
        self._members: dict[str, list[Handle]] = {}
        """Engine → its parts on further machines."""

    def ready(self) -> None:
        self._gather("start", [handle.ready() for handle in [*self.handles, *self._all_members()]])

    def _all_members(self) -> list[Handle]:
        return [member for members in self._members.values() for member in members]

    def _gather(self, phase: str, futures: Sequence[Future]) -> list[Any]:
        """Engines that do not answer in time are ended; ComponentHung names the first of them. Who finds them dead
        later, because that was of no consequence then, hears the same."""
        try:
            return super()._gather(phase, futures)
        except DeadlineExpired as expired:
            hung = end_hung(self._runtime, expired, futures)
            self._hung |= {each.name: each for each in hung}
            raise hung[0] from None
        except ComponentDied as death:
            raise self._hung.get(death.name) or self._of_engine(death) from None

    def _of_engine(self, death: ComponentDied) -> ComponentDied:
        """An engine is dead when a part of it is."""
        for engine, members in self._members.items():
            if death.name in [member.name for member in members]:
                return ComponentDied(engine, f"{death.name} died: {death.cause}", death.last_lines)
        return death

    def restart(self, name: str) -> Handle:
        """A new engine in the place of one that has died. It needs weights."""
        self._hung.pop(name, None)
        engine, *members = self._start(name)
        self.handles[self.names.index(name)], self._members[name] = engine, members
        self._gather("start", [handle.ready() for handle in (engine, *members)])
        return engine

    def write_weights(self, manifest: WeightsManifest, engine: int) -> None:
        """By this engine alone, whatever has become of the others."""
        self._gather("write_weights", [self.handles[engine].call("write_weights", manifest)])

    def sleep(self, tags: Sequence[str]) -> None:
        """An engine that has died, or hangs and is ended, has given all of its memory away: who needs it will see."""
        for call in [handle.call("sleep", tags) for handle in self.handles]:
            with suppress(ComponentDied):
                self._gather("sleep", [call])

    def wake(self, tags: Sequence[str]) -> None:
        self.call("wake", tags)

    def memory(self) -> list[MemoryUse]:
        """Of those that answer."""
        uses = []
        for call in [handle.call("memory") for handle in [*self.handles, *self._all_members()]]:
            with suppress(ComponentDied):
                uses += self._gather("memory", [call])
        return uses

    def checksums(self) -> list[dict[str, str]]:
        return self.call("checksums")

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[np.ndarray]]:
        return self.call("score", sequences)

    def statistics(self) -> list[EngineStatistics]:
        return self.call("statistics")

"""All engines as one, between rollouts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_pbsd.controller.failures import DeadlineExpired
from megatron_pbsd.controller.gather import end_hung
from megatron_pbsd.controller.group import Group
from megatron_pbsd.controller.runtime import Future, Handle, Runtime
from megatron_pbsd.rollout.engines.host import EngineHost
from megatron_pbsd.rollout.engines.protocol import EngineStatistics

if TYPE_CHECKING:
    from megatron_pbsd.resharding.manifest import WeightsManifest


class EngineGroup(Group):
    """Lists hold one entry per engine. See `rollout.engines.protocol.Engine`."""

    kind = "engines"
    _start: Callable[[str], Handle]

    @classmethod
    def spawn(
        cls, runtime: Runtime, factory: Callable[..., Any], *, count: int, deadline_s: float, **arguments: Any
    ) -> EngineGroup:
        """Start `factory(name=..., **arguments)` `count` times. Does not wait for them: see `ready`."""
        def start(name: str) -> Handle:
            return runtime.spawn(name, EngineHost, factory, name=name, **arguments)

        group = cls(runtime, [start(f"engine-{i}") for i in range(count)], deadline_s)
        group._start = start
        return group

    def _gather(self, phase: str, futures: Sequence[Future]) -> list[Any]:
        """Engines that do not answer in time are ended; ComponentHung names the first of them."""
        try:
            return super()._gather(phase, futures)
        except DeadlineExpired as expired:
            raise end_hung(self._runtime, expired, futures)[0] from None

    def restart(self, name: str) -> Handle:
        """A new engine in the place of one that has died. It needs weights."""
        handle = self.handles[self.names.index(name)] = self._start(name)
        self._gather("start", [handle.ready()])
        return handle

    def update_weights(self, manifest: WeightsManifest, version: int) -> None:
        self.call("update_weights", manifest, version)

    def write_weights(self, manifest: WeightsManifest, engine: int) -> None:
        """By this engine alone, whatever has become of the others."""
        self._gather("write_weights", [self.handles[engine].call("write_weights", manifest)])

    def restore_weights(self, manifest: WeightsManifest, version: int, engine: str) -> dict[str, str]:
        """As `update_weights`, of one engine, and its checksums."""
        handle = self.handles[self.names.index(engine)]
        return self._gather("restore_weights", [
            handle.call("update_weights", manifest, version), handle.call("checksums")])[1]

    def checksums(self) -> list[dict[str, str]]:
        return self.call("checksums")

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[np.ndarray]]:
        return self.call("score", sequences)

    def statistics(self) -> list[EngineStatistics]:
        return self.call("statistics")

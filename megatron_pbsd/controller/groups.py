"""Groups of like components that are called together: all ranks of the learner, all engines."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np

from megatron_pbsd.batch import Batch
from megatron_pbsd.controller.gather import gather
from megatron_pbsd.controller.runtime import Future, Handle, Runtime
from megatron_pbsd.resharding.manifest import WeightsManifest
from megatron_pbsd.rollout.engines.host import EngineHost
from megatron_pbsd.rollout.engines.protocol import EngineStatistics

class Group:
    """`handles`: the members, in order. `deadline_s`: for every phase, seconds."""

    kind: ClassVar[str]

    def __init__(self, runtime: Runtime, handles: Sequence[Handle], deadline_s: float):
        self.handles = list(handles)
        self.names = [handle.name for handle in handles]
        self._runtime, self._deadline_s = runtime, deadline_s

    def ready(self) -> None:
        """Wait until all members have been constructed."""
        self._gather("start", [handle.ready() for handle in self.handles])

    def call(self, method: str, *args: Any) -> list[Any]:
        return self._gather(method, [handle.call(method, *args) for handle in self.handles])

    def _gather(self, phase: str, futures: Sequence[Future]) -> list[Any]:
        return gather(self._runtime, futures, phase=f"{self.kind}.{phase}", deadline_s=self._deadline_s)


class LearnerGroup(Group):
    """All ranks of the learner, called alike; see `learner.Learner` for what each method does."""

    kind = "learner"

    @classmethod
    def spawn(
        cls, runtime: Runtime, factory: Callable[..., Any], *, world_size: int, deadline_s: float, **arguments: Any
    ) -> LearnerGroup:
        """Start `factory(rank, rendezvous, **arguments)` for every rank. Does not wait for them: see `ready`."""
        rendezvous = f"tcp://127.0.0.1:{free_port()}"
        return cls(runtime, [
            runtime.spawn(f"learner-{rank}", factory, rank, rendezvous, **arguments) for rank in range(world_size)
        ], deadline_s)

    def log_probs(self, batch: Batch) -> list[np.ndarray]:
        return self.call("log_probs", self._runtime.share(batch))[0]

    def step(self, batch: Batch) -> dict[str, float]:
        return self.call("step", self._runtime.share(batch))[0]

    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        return self.call("tensors")[0]

    def publish(self, manifest: WeightsManifest) -> None:
        self.call("publish", manifest)

    def differing(self, manifest: WeightsManifest) -> list[str]:
        """Tensors that some rank finds published with other bytes than it holds."""
        return list(dict.fromkeys(name for names in self.call("differing", manifest) for name in names))

    def save(self, folder: str) -> None:
        self.call("save", folder)

    def load(self, folder: str) -> None:
        self.call("load", folder)

    def close(self) -> None:
        self.call("close")


class EngineGroup(Group):
    """All engines, between rollouts; lists hold one entry per engine. See `rollout.engines.protocol.Engine`."""

    kind = "engines"

    @classmethod
    def spawn(
        cls, runtime: Runtime, factory: Callable[..., Any], *, count: int, deadline_s: float, **arguments: Any
    ) -> EngineGroup:
        """Start `factory(name=..., **arguments)` `count` times. Does not wait for them: see `ready`."""
        names = [f"engine-{i}" for i in range(count)]
        return cls(runtime, [
            runtime.spawn(name, EngineHost, factory, name=name, **arguments) for name in names
        ], deadline_s)

    def update_weights(self, manifest: WeightsManifest, version: int) -> None:
        self.call("update_weights", manifest, version)

    def checksums(self) -> list[dict[str, str]]:
        return self.call("checksums")

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[np.ndarray]]:
        return self.call("score", sequences)

    def statistics(self) -> list[EngineStatistics]:
        return self.call("statistics")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]

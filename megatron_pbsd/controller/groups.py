"""All learner ranks, and all engines, as one component each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_pbsd.batch import Batch
from megatron_pbsd.controller.runtime import Handle, Runtime, gather

if TYPE_CHECKING:
    from megatron_pbsd.resharding.manifest import WeightsManifest


class _Group:
    def __init__(self, handles: Sequence[Handle], deadline_s: float):
        self._handles, self._deadline_s = list(handles), deadline_s
        self.names = [handle.name for handle in handles]

    def _all(self, method: str, *args: Any) -> list[Any]:
        calls = [handle.call(method, *args) for handle in self._handles]
        return gather(method, self._handles, calls, self._deadline_s)


class LearnerGroup(_Group):
    """Every method is called on every rank; a collective needs them all. See `learner.Learner`."""

    def __init__(self, handles: Sequence[Handle], deadline_s: float, runtime: Runtime):
        super().__init__(handles, deadline_s)
        self._runtime = runtime

    def log_probs(self, batch: Batch) -> list[np.ndarray]:
        return self._all("log_probs", self._runtime.share(batch))[0]

    def step(self, batch: Batch) -> dict[str, float]:
        return self._all("step", self._runtime.share(batch))[0]

    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        return self._all("tensors")[0]

    def publish(self, manifest: WeightsManifest) -> None:
        self._all("publish", manifest)

    def differing(self, manifest: WeightsManifest) -> list[str]:
        """Tensors of which some rank holds other bytes than were published."""
        return sorted({name for names in self._all("differing", manifest) for name in names})

    def save(self, folder: str) -> None:
        self._all("save", folder)

    def load(self, folder: str) -> None:
        self._all("load", folder)


class EngineGroup(_Group):
    """The engines between rollouts; during one, the coordinator talks to them. See `rollout.engines.protocol`."""

    def update_weights(self, manifest: WeightsManifest, version: int) -> None:
        self._all("update_weights", manifest, version)

    def checksums(self) -> list[dict[str, str]]:
        return self._all("checksums")

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[np.ndarray]]:
        return self._all("score", sequences)

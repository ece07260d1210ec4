"""An engine behind a handle: the engine protocol, and one combined call that costs one round trip."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_pbsd.rollout.engines.protocol import Chunk, ChunkResult, Engine, EngineStatistics

if TYPE_CHECKING:
    from megatron_pbsd.models.sglang import ServerParallel
    from megatron_pbsd.platform.process_group import GroupPlace
    from megatron_pbsd.platform.usage import MemoryUse
    from megatron_pbsd.resharding.arrival import Arriving
    from megatron_pbsd.resharding.manifest import WeightsManifest
    from megatron_pbsd.resharding.stream import Described


class EngineHost:
    """Owns the engine that `factory(**arguments)` returns. See `protocol.Engine`."""

    def __init__(self, factory: Callable[..., Engine], /, **arguments: Any):
        self._engine = factory(**arguments)

    def pump(
        self, submissions: Sequence[Chunk], releases: Sequence[str], hand_overs: Sequence[str] = ()
    ) -> list[ChunkResult]:
        """`release`, `hand_over`, `submit`, then `collect`."""
        self._engine.release(releases)
        self._engine.hand_over(hand_overs)
        self._engine.submit(submissions)
        return self._engine.collect()

    def interrupt(self) -> None:
        """To be observed: a `pump` that runs returns as soon as it can. `abort` ends that."""
        self._engine.interrupt()

    def abort(self, request_ids: Sequence[str]) -> list[ChunkResult]:
        """End these chunks, which are all that the engine has; what there is of them."""
        self._engine.abort(request_ids)
        return self._engine.collect()

    def release(self, request_ids: Sequence[str]) -> None:
        self._engine.release(request_ids)

    def update_weights(self, manifest: WeightsManifest, version: int) -> None:
        self._engine.update_weights(manifest, version)

    def begin_update(self, tensors: Described, version: int, base: int | None = None) -> None:
        self._engine.begin_update(tensors, version, base)

    def load(self, bucket: Arriving) -> None:
        self._engine.load(bucket)

    def end_update(self) -> None:
        self._engine.end_update()

    def join_group(self, place: GroupPlace, rank: int) -> ServerParallel | None:
        return self._engine.join_group(place, rank)

    def write_weights(self, manifest: WeightsManifest) -> None:
        self._engine.write_weights(manifest)

    def sleep(self, tags: Collection[str]) -> None:
        self._engine.sleep(tags)

    def wake(self, tags: Collection[str]) -> None:
        self._engine.wake(tags)

    def memory(self) -> MemoryUse:
        return self._engine.memory()

    def checksums(self) -> dict[str, str]:
        return self._engine.checksums()

    def score(self, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
        return self._engine.score(sequences)

    def statistics(self) -> EngineStatistics:
        return self._engine.statistics()

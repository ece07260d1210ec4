"""Weights through memory of learner rank 0 that engines' processes on the same machine map: CUDA IPC of a GPU's, a file
in shared memory of a CPU's.

Learner ranks send rank 0 their parts of a bucket, and each rank of an engine opens a handle of the whole and takes what
it needs. Rank 0 has two buckets, and nobody else any.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from megatron_pbsd.resharding.arrival import Mapped
from megatron_pbsd.resharding.plan import Plan
from megatron_pbsd.resharding.stream import Wait, messages, overlapped
from megatron_pbsd.resharding.transport import Members, Source, Update, check_ranks, prepare, replicas_that_differ


class IPCTransport:
    """engine_ranks: of each engine."""

    keeps = False

    def __init__(self, source: Source, target: Members, plan: Plan, *, engine_ranks: int):
        self._source, self._target, self._size = source, target, engine_ranks
        self._buckets = messages(plan)
        self._tensors = prepare(source, self._buckets)

    def send(self, version: int, engines: Sequence[str]) -> dict[str, str]:
        """While engines copy a bucket, the learner's ranks put the other together."""
        digests = self._source.wait("digests", self._source.start("digests"))
        check_ranks(version, [replicas_that_differ(digests)])
        checksums: dict[str, str] = {}
        handles: list[bytes] = []

        def gather(number: int) -> Wait:
            pending = self._source.start("share", number, len(engines) * self._size)

            def gathered() -> None:
                handles[:], found = self._source.wait("share", pending)[0]
                checksums.update(found)

            return gathered

        def load(number: int) -> Wait:
            manifest, size = self._buckets[number].manifest, self._size
            pending = [
                future for index, engine in enumerate(engines) for future in self._target.start(
                    "load", Mapped(tuple(handles[index * size : (index + 1) * size]), manifest), only=[engine])]
            return lambda: self._target.wait("load", pending)

        with Update(self._target, engines, self._tensors, version):
            overlapped(len(self._buckets), gather, load)
        return checksums

    def restore(self, version: int, engine: str) -> None:
        self.send(version, [engine])

    def copies(self) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        return iter(())

    def close(self) -> None:
        """The memory is the learner's."""

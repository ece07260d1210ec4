"""Weights through a torch.distributed group: learner rank 0, and every rank of every engine. gloo or NCCL.

Learner ranks send rank 0 their parts of a bucket, and it sends each of the engines' ranks what that lacks of it, where
engines say how they divide the model; otherwise it broadcasts the whole, and each takes what it needs. Rank 0 has two
buckets, and each engine rank what it is sent of one.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Sequence

import torch

from megatron_pbsd.models.decoder import Decoder
from megatron_pbsd.models.sglang import ServerParallel
from megatron_pbsd.platform.process_group import GroupPlace
from megatron_pbsd.resharding.arrival import Broadcast, Scattered
from megatron_pbsd.resharding.plan import Plan
from megatron_pbsd.resharding.stream import messages
from megatron_pbsd.resharding.transport import (
    Members,
    PublicationError,
    Source,
    Update,
    check_ranks,
    prepare,
    replicas_that_differ,
)


class CollectiveTransport:
    """decoder: the model. engine_ranks: of each engine. meeting_point: host and port where learner rank 0 may listen.
    backend: gloo or nccl. deadline_s: for each collective, and for members to come."""

    keeps = False

    def __init__(self, source: Source, target: Members, plan: Plan, *, decoder: Decoder, engine_ranks: int,
                 meeting_point: Callable[[], tuple[str, int]], deadline_s: float, backend: str = "gloo"):
        self._source, self._target, self._decoder, self._size = source, target, decoder, engine_ranks
        self._meeting_point, self._deadline_s, self._backend = meeting_point, deadline_s, backend
        self._buckets = messages(plan)
        self._tensors = prepare(source, self._buckets)
        self._members: tuple[str, ...] = ()
        """Engines that have joined the group, none when it may be broken."""
        self._group = ""
        self._server: ServerParallel | None = None
        """How all of them divide the model."""

    def send(self, version: int, engines: Sequence[str]) -> dict[str, str]:
        """Two buckets are on their way at a time."""
        digests = self._source.wait("digests", self._source.start("digests"))
        check_ranks(version, [replicas_that_differ(digests)])
        if self._members != tuple(engines):
            self._meet(engines)
        members, self._members = self._members, ()
        checksums: dict[str, str] = {}
        with Update(self._target, engines, self._tensors, version):
            started = [self._start(0, engines)]
            for number in range(len(self._buckets)):
                if number + 1 < len(self._buckets):
                    started.append(self._start(number + 1, engines))
                for result in self._target.wait("load", started[number]):
                    checksums |= result or {}
            self._source.wait("sent", self._source.start("sent"))
        self._members = members
        if lacking := self._tensors.keys() - checksums.keys():
            raise PublicationError(f"version {version}: learner rank 0 sent nothing of {sorted(lacking)}")
        return checksums

    def _start(self, number: int, engines: Sequence[str]) -> list:
        kind, method = (Scattered, "scatter") if self._server else (Broadcast, "broadcast")
        bucket = kind(self._group, self._buckets[number].manifest)
        return self._target.start("load", bucket, only=engines) + self._source.start(method, number)

    def _meet(self, engines: Sequence[str]) -> None:
        """A new group of learner rank 0 and these engines."""
        self._group = f"weights-{uuid.uuid4().hex[:12]}"
        host, port = self._meeting_point()
        place = GroupPlace(self._group, host, port, 1 + len(engines) * self._size, self._backend, self._deadline_s)
        pending = self._source.start("open_group", place)
        joining = [future for number, engine in enumerate(engines)
                   for future in self._target.start("join_group", place, 1 + number * self._size, only=[engine])]
        first, *others = self._target.wait("join_group", joining + pending)[: len(joining)]
        self._server = first if all(other == first for other in others) else None
        if self._server:
            self._source.wait("divide", self._source.start("divide", self._decoder, self._server, len(engines)))
        self._members = tuple(engines)

    def restore(self, version: int, engine: str) -> None:
        self.send(version, [engine])

    def copies(self) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        return iter(())

    def close(self) -> None:
        """The group ends with its processes."""

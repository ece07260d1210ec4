"""How a plan's buckets get from the learner to engines; publication.py proves that they did.

    segment      all weights are one bucket in shared memory, which stays: an engine that is started anew, or a run that
                 has lost its learner, has them from there
    buckets      two buckets in shared memory, of which one is filled while the other is read; nothing is held twice
    ipc          two buckets in learner rank 0's own memory, which the engines' ranks map (ipc.py)
    collective   learner rank 0 sends the engines' ranks their shares of buckets, or broadcasts these (broadcast.py)
    disk         files, of all tensors or of those that have changed (disk.py)

Engines that are between two versions serve nothing until a publication has ended.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch

from megatron_pbsd.errors import PbsdError
from megatron_pbsd.resharding.checksum import checksum
from megatron_pbsd.resharding.manifest import WeightsManifest
from megatron_pbsd.resharding.plan import Plan
from megatron_pbsd.resharding.shared_memory import Mappings, attach
from megatron_pbsd.resharding.stream import Bucket, Buckets, Described, Wait, overlapped

Pending = list[Any]
"""Results that are owed."""
Loaded = Callable[[Mapping[str, torch.Tensor], Mapping[str, str]], object]
"""Waits until a bucket has been read, whose tensors it is given, and checksums, of earlier ones too."""


class PublicationError(PbsdError):
    """Engines do not hold the learner's weights; the message names the tensors."""

    component = "weights"


class Members(Protocol):
    """Learner ranks or engines: each by itself, or all alike."""

    names: Sequence[str]

    def start(self, method: str, *args: Any, only: Sequence[str] | None = None) -> Pending:
        """Begin with a call of all members, or of those that are named."""

    def wait(self, phase: str, pending: Pending) -> list[Any]:
        """Results, in order; `pending` may be of both kinds of members. Raises what went wrong first, a death before
        anything that followed from it."""


class Source(Members, Protocol):
    """The learner, all ranks of it."""

    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]: ...


class Transport(Protocol):
    keeps: bool
    """Whether what was last sent stays somewhere until the next is: an engine can have it without the learner."""

    def send(self, version: int, engines: Sequence[str]) -> dict[str, str]:
        """All of the learner's weights to these engines, as `version`; checksums of what was sent, by tensor.

        PublicationError names tensors that learner ranks have different bytes of.
        """

    def restore(self, version: int, engine: str) -> None:
        """What was last sent, to an engine that has been started anew."""

    def copies(self) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        """Where weights are besides learner and engines, and they."""

    def close(self) -> None: ...


class SegmentTransport:
    """plan: with one bucket of everything."""

    keeps = True

    def __init__(self, source: Source, target: Members, plan: Plan):
        self._source, self._target = source, target
        self._buckets = Buckets(plan)
        (self._bucket,) = self._buckets.buckets
        prepare(source, self._buckets.buckets)

    def send(self, version: int, engines: Sequence[str]) -> dict[str, str]:
        """Engines keep what they have until all of the new weights are there and compared."""
        self._source.wait("gather", self._source.start("gather", 0))
        check_ranks(version, self._source.wait("differing", self._source.start("differing", self._bucket.manifest)))
        self._update(version, engines)
        return {name: checksum(tensor) for name, tensor in attach(self._bucket.manifest).items()}

    def restore(self, version: int, engine: str) -> None:
        self._update(version, [engine])

    def _update(self, version: int, engines: Sequence[str]) -> None:
        pending = self._target.start("update_weights", self._bucket.manifest, version, only=engines)
        self._target.wait("update_weights", pending)

    def copies(self) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        yield "the segment", attach(self._bucket.manifest)

    def close(self) -> None:
        self._buckets.close()


class BucketsTransport:
    keeps = False

    def __init__(self, source: Source, target: Members, plan: Plan):
        self._source, self._target = source, target
        self._buckets = Buckets(plan)
        self._tensors = prepare(source, self._buckets.buckets)

    def send(self, version: int, engines: Sequence[str]) -> dict[str, str]:
        """While engines copy a bucket, the learner's ranks compare it with what they have, and fill the other."""
        def load(manifest: WeightsManifest) -> Loaded:
            pending = self._target.start("load", manifest, only=engines)
            return lambda tensors, checksums: self._target.wait("load", pending)

        with Update(self._target, engines, self._tensors, version):
            return through_buckets(self._source, self._buckets.buckets, version, load)

    def restore(self, version: int, engine: str) -> None:
        self.send(version, [engine])

    def copies(self) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        return iter(())

    def close(self) -> None:
        self._buckets.close()


class Update:
    """Engines are between two versions from entry on, and have the new one at an exit without exception."""

    def __init__(self, target: Members, engines: Sequence[str], tensors: Described, version: int,
                 base: int | None = None):
        self._target, self._engines, self._arguments = target, engines, (tensors, version, base)

    def __enter__(self) -> None:
        self._call("begin_update", *self._arguments)

    def __exit__(self, kind: type | None, *exception: object) -> None:
        if kind is None:
            self._call("end_update")

    def _call(self, method: str, *args: Any) -> None:
        self._target.wait(method, self._target.start(method, *args, only=self._engines))


def through_buckets(
    source: Source, buckets: Sequence[Bucket], version: int, load: Callable[[WeightsManifest], Loaded]
) -> dict[str, str]:
    """Fill buckets in shared memory, of which `load` starts to read one, while learner ranks compare it with what they
    have; checksums. PublicationError as of `Transport.send`."""
    checksums: dict[str, str] = {}
    mappings = Mappings()

    def gather(number: int) -> Wait:
        pending = source.start("gather", number)
        return lambda: source.wait("gather", pending)

    def read(number: int) -> Wait:
        manifest = buckets[number].manifest
        comparing = source.start("differing", manifest)
        loaded = load(manifest)

        def wait() -> None:
            tensors = mappings.tensors(manifest)
            checksums.update({name: checksum(tensor) for name, tensor in tensors.items()})
            loaded(tensors, checksums)
            check_ranks(version, source.wait("differing", comparing))

        return wait

    overlapped(len(buckets), gather, read)
    return checksums


def prepare(source: Source, buckets: Sequence[Bucket]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Tell the learner what it will be asked for; the tensors that these are."""
    source.wait("prepare", source.start("prepare", buckets))
    return {name: what for bucket in buckets for name, what in bucket.manifest.described.items()}


def check_ranks(version: int, differing: Sequence[Sequence[str]]) -> None:
    """PublicationError when any rank names tensors."""
    if names := list(dict.fromkeys(name for names in differing for name in names)):
        raise PublicationError(f"version {version}: learner ranks disagree with what was published of {names}")


def replicas_that_differ(digests: Sequence[Mapping[tuple[str, str], str]]) -> list[str]:
    """Tensors of which ranks, each with its own digests, have the same part with other bytes."""
    first: dict[tuple[str, str], str] = {}
    return sorted({name for rank in digests for (name, part), digest in rank.items()
                   if first.setdefault((name, part), digest) != digest})


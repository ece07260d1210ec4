"""A plan carried out through shared memory: two buckets, of which one is filled while the other is read.

Learner ranks write their parts of a bucket straight from their parameters, engines copy each part straight into theirs:
nowhere is there more of the model than two buckets. All engines with the same layout read the same buckets, and a plan
for one of them serves all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from megatron_pbsd.resharding.plan import Plan, Transfer, aligned
from megatron_pbsd.resharding.shared_memory import Segment, mapped
from megatron_pbsd.resharding.wire import Transform

SLOTS = 2
COPIED = (Transform.COPY, Transform.CAST_AT_SOURCE, Transform.CAST_AT_TARGET)
Wait = Callable[[], object]


@dataclass(frozen=True)
class Parcel:
    """A transfer, and where in its bucket it lies (bytes from the start)."""

    transfer: Transfer
    offset: int


def parcels(plan: Plan, target: int) -> list[list[Parcel]]:
    """What a target rank receives, bucket by bucket. ValueError when something has to be quantised: copying numbers
    into shared memory does not."""
    buckets = []
    for bucket in plan.buckets(target):
        offset, packed = 0, []
        for transfer in bucket:
            if transfer.wire.transform not in COPIED:
                raise ValueError(f"{transfer.tensor}: {transfer.wire.transform}; shared memory takes tensors that are "
                                 f"{' or '.join(COPIED)}")
            packed.append(Parcel(transfer, offset))
            offset += aligned(transfer.nbytes)
        buckets.append(packed)
    return buckets


class Buckets:
    """Owns `SLOTS` buckets in shared memory until `close`. Picklable are only `segment` and `nbytes`."""

    def __init__(self, buckets: Sequence[Sequence[Parcel]]):
        self.nbytes = max((aligned(bucket[-1].offset + bucket[-1].transfer.nbytes) for bucket in buckets), default=0)
        """Of one bucket."""
        self._segment = Segment(SLOTS * self.nbytes)
        self.segment = self._segment.name

    def close(self) -> None:
        self._segment.close()


class Sender:
    """What learner rank `rank` puts into the buckets.

    parameters: by model chunk and Megatron's name.
    """

    def __init__(
        self, buckets: Sequence[Sequence[Parcel]], rank: int, parameters: Mapping[tuple[int, str], torch.Tensor],
        segment: str, nbytes: int,
    ):
        self._slots = _Slots(segment, nbytes)
        self._parts = [[
            (parcel, parameters[place.chunk, place.name].detach()[place.box])
            for parcel in bucket if parcel.transfer.source == rank for place in [parcel.transfer.source_place]]
            for bucket in buckets]

    def gather(self, number: int) -> None:
        """Fill this rank's part of a bucket, whose slot nobody reads any more."""
        for parcel, part in self._parts[number]:
            self._slots.view(number, parcel, part.shape).copy_(part)


class Receiver:
    """What an engine's rank takes out of the buckets. parameters: by the names of its layout."""

    def __init__(
        self, buckets: Sequence[Sequence[Parcel]], parameters: Mapping[str, torch.Tensor], segment: str, nbytes: int
    ):
        self._slots = _Slots(segment, nbytes)
        self._parts = [[(parcel, parameters[place.name].detach()[place.box])
                        for parcel in bucket for place in [parcel.transfer.target_place]] for bucket in buckets]

    def load(self, number: int) -> None:
        """Copy a bucket, which all senders have filled, into the parameters."""
        for parcel, part in self._parts[number]:
            part.copy_(self._slots.view(number, parcel, part.shape))


def overlapped(count: int, gather: Callable[[int], Wait], load: Callable[[int], Wait]) -> None:
    """Move `count` buckets: bucket n + 1 is gathered while bucket n is loaded.

    gather, load: start with a bucket and return what waits for its end. A slot is written to only when all have read
    what was in it before, and read only when all have written.
    """
    gathered = gather(0) if count else None
    for number in range(count):
        gathered()
        loaded = load(number)
        gathered = gather(number + 1) if number + 1 < count else None
        loaded()


class _Slots:
    def __init__(self, segment: str, nbytes: int):
        self._flat, self._nbytes = mapped(segment, SLOTS * nbytes), nbytes

    def view(self, number: int, parcel: Parcel, shape: torch.Size) -> torch.Tensor:
        """The parcel's bytes in the slot of bucket `number` as numbers of what is sent."""
        start = number % SLOTS * self._nbytes + parcel.offset
        dtype = getattr(torch, parcel.transfer.wire.dtype)
        return self._flat[start : start + parcel.transfer.nbytes].view(dtype).view(shape)

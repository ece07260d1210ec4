"""A plan carried out bucket by bucket: whole tensors, which learner ranks put together from their parts.

SGLang's loaders take whole tensors, and checksums are of whole tensors: both are why none is in two buckets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from megatron_pbsd.config import ParallelConfig
from megatron_pbsd.models.decoder import Decoder, kept_in_float32
from megatron_pbsd.resharding.block_scale import on_the_wire, sent_as
from megatron_pbsd.resharding.layouts import embedded_layout, learner_layout
from megatron_pbsd.resharding.manifest import TensorEntry, WeightsManifest, layout, view
from megatron_pbsd.resharding.plan import Plan, Transfer, make_plan
from megatron_pbsd.resharding.shared_memory import Mappings, Segment
from megatron_pbsd.resharding.wire import Transform

SLOTS = 2
SENDABLE = tuple(transform for transform in Transform if transform is not Transform.QUANTISE_AT_TARGET)
ONE_NODE = 1 << 30
"""Devices of a node, so many that all ranks are on one."""
Described = Mapping[str, tuple[str, tuple[int, ...]]]
"""Tensor → dtype, shape."""
Wait = Callable[[], object]


def plan_for(decoder: Decoder, parallel: ParallelConfig, tensors: Described, bucket_bytes: int | None,
             target_dtype: str | None = None) -> Plan:
    """From a learner to an engine that has each of `tensors` whole, as the learner has it, or as a model of
    `target_dtype` has. bucket_bytes: None makes one bucket of everything. ModelError when the model cannot be divided
    so."""
    (dtype,) = {dtype for name, (dtype, _) in tensors.items() if not kept_in_float32(name)}
    return make_plan(
        learner_layout(decoder, parallel), embedded_layout(decoder, 1, device=parallel.world_size), source_dtype=dtype,
        target_dtype=target_dtype or dtype, devices_per_node=ONE_NODE, bucket_bytes=bucket_bytes or 1 << 60)


@dataclass(frozen=True)
class Bucket:
    """Whole tensors that are moved together: where they lie in a bucket, and what learner ranks put there."""

    manifest: WeightsManifest
    transfers: tuple[Transfer, ...]

    @property
    def nbytes(self) -> int:
        """On the wire."""
        return sum(transfer.nbytes for transfer in self.transfers)


def divided(plan: Plan) -> list[tuple[Transfer, ...]]:
    """What is moved together. ValueError when a block that shares a scale is divided over ranks: whole tensors are put
    together of what these send."""
    buckets = [tuple(bucket) for bucket in plan.buckets(0, whole=True)]
    for transfer in (transfer for bucket in buckets for transfer in bucket):
        if transfer.wire.transform not in SENDABLE:
            raise ValueError(f"{transfer.tensor}: {transfer.wire.transform}; buckets take tensors that are "
                             f"{' or '.join(SENDABLE)}")
    return buckets


def described(transfers: Sequence[Transfer]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The tensors that these make, all of whose parts are among them, as they are sent."""
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for transfer in transfers:
        for name, dtype, box in sent_as(transfer.tensor, transfer.box, transfer.wire):
            ends = tuple(part.stop for part in box)
            _, known = found.get(name, ("", ends))
            found[name] = dtype, tuple(map(max, ends, known))
    return found


def messages(plan: Plan) -> list[Bucket]:
    """Buckets without gaps, each from byte 0 on: what is sent as one tensor of bytes. Of the widest numbers first, so
    that all are aligned."""
    made = []
    for transfers in divided(plan):
        tensors = described(transfers)
        widest = sorted(tensors, key=lambda name: -getattr(torch, tensors[name][0]).itemsize)
        made.append(Bucket(layout("", {name: tensors[name] for name in widest}, alignment=1), transfers))
    return made


def slots(buckets: Sequence[Described]) -> tuple[int, int]:
    """How many buckets are held at a time, and bytes for each."""
    return min(SLOTS, len(buckets)), max(layout("", tensors).nbytes for tensors in buckets)


class Buckets:
    """Owns a segment with room for `SLOTS` buckets until `close`; bucket n lies in slot n modulo `SLOTS`."""

    def __init__(self, plan: Plan):
        parts = divided(plan)
        tensors = [described(transfers) for transfers in parts]
        self.slots, self.nbytes = slots(tensors)
        self._segment = Segment(self.slots * self.nbytes)
        name = self._segment.name
        self.buckets = [Bucket(layout(name, each, start=number % SLOTS * self.nbytes), transfers)
                        for number, (each, transfers) in enumerate(zip(tensors, parts, strict=True))]

    def close(self) -> None:
        self._segment.close()


class Parts:
    """What learner rank `rank` has of each bucket. parameters: by model chunk and the parameter map's name."""

    def __init__(self, buckets: Sequence[Bucket], rank: int, parameters: Mapping[tuple[int, str], torch.Tensor]):
        self.buckets = list(buckets)
        self._parts = [[
            (transfer, parameters[place.chunk, place.name].detach()[place.box])
            for transfer in bucket.transfers if transfer.source == rank for place in [transfer.source_place]]
            for bucket in buckets]
        self._mappings = Mappings()
        self._places: dict[int, list[list[torch.Tensor]]] = {}

    def gather(self, number: int) -> None:
        """Fill this rank's part of a bucket in shared memory, whose slot nobody reads any more."""
        if number not in self._places:
            self._places[number] = self._where(number, self._mappings.tensors(self.buckets[number].manifest))
        self._fill(number, self._places[number])

    def pack(self, number: int) -> torch.Tensor | None:
        """This rank's parts of a bucket end to end, uint8 [N]; None when there are none."""
        return end_to_end(
            sent for transfer, part in self._parts[number] for sent in on_the_wire(part, transfer.wire))

    def write(self, number: int, flat: torch.Tensor) -> None:
        """This rank's parts into a bucket, uint8 [at least its bytes]."""
        self._fill(number, self._where(number, tensors_in(flat, self.buckets[number].manifest.entries)))

    def _where(self, number: int, tensors: Mapping[str, torch.Tensor]) -> list[list[torch.Tensor]]:
        """Of each part, in these tensors."""
        return [[tensors[name][box] for name, _, box in sent_as(transfer.tensor, transfer.box, transfer.wire)]
                for transfer, _ in self._parts[number]]

    def _fill(self, number: int, places: list[list[torch.Tensor]]) -> None:
        for made, (transfer, part) in zip(places, self._parts[number], strict=True):
            # Casts need no copy of their own.
            sent = (part,) if transfer.wire.block is None else on_the_wire(part, transfer.wire)
            for place, numbers in zip(made, sent, strict=True):
                place.copy_(numbers)


def end_to_end(parts: Iterable[torch.Tensor]) -> torch.Tensor | None:
    """The bytes of all, uint8 [N]; None when there are none."""
    flat = [part.contiguous().view(-1).view(torch.uint8) for part in parts]
    return torch.cat(flat) if flat else None


def sent_by(bucket: Bucket) -> dict[int, int]:
    """Bytes that each learner rank has of a bucket, by rank."""
    found: dict[int, int] = {}
    for transfer in bucket.transfers:
        found[transfer.source] = found.get(transfer.source, 0) + transfer.nbytes
    return found


def unpack(bucket: Bucket, source: int, packed: torch.Tensor, flat: torch.Tensor) -> None:
    """Into the bucket `flat` what rank `source` has packed."""
    tensors, start = tensors_in(flat, bucket.manifest.entries), 0
    for transfer in (transfer for transfer in bucket.transfers if transfer.source == source):
        for name, _, box in sent_as(transfer.tensor, transfer.box, transfer.wire):
            place = tensors[name][box]
            part = packed[start : start + place.nbytes].view(torch.uint8)
            place.copy_(part.clone().view(place.dtype).view(place.shape))
            start += place.nbytes


def tensors_in(flat: torch.Tensor, entries: Sequence[TensorEntry]) -> dict[str, torch.Tensor]:
    """Tensors that share the memory of a bucket."""
    return {entry.name: view(flat, entry) for entry in entries}


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

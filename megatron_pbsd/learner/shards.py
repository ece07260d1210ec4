"""Which boxes of a checkpoint's tensors the elements of a rank's parameters are. Pure.

A rank has all elements of a parameter, or those that lie between two places when it is flattened: Megatron-core's
distributed optimizer cuts its buffers anywhere. A checkpoint has boxes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch

from megatron_pbsd.boxes import Box, intersection, relative
from megatron_pbsd.models.dist_checkpoint import Place
from megatron_pbsd.models.parameters import Piece


@dataclass(frozen=True)
class Shard:
    """local[box] == stored[offset : offset + sizes of box], with `local` a parameter and `stored` the checkpoint's
    tensor `key`, of this shape. Leading axes of `stored` that `local` lacks have a size of 1."""

    key: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    box: Box

    @property
    def size(self) -> tuple[int, ...]:
        return tuple(s.stop - s.start for s in self.box)

    @property
    def stored_box(self) -> Box:
        sizes = (1,) * (len(self.shape) - len(self.box)) + self.size
        return tuple(slice(o, o + n) for o, n in zip(self.offset, sizes, strict=True))


def shards(
    pieces: Sequence[Piece], places: Mapping[str, Sequence[Place]], shape: Sequence[int], start: int, stop: int
) -> list[Shard]:
    """Elements [start, stop) of the flattened parameter of this shape; those that no piece covers are left out.

    ValueError when a checkpoint has no place for some of them.
    """
    found: list[Shard] = []
    for box in flat_boxes(shape, start, stop):
        for piece in pieces:
            held = intersection(piece.local_index, box)
            if held is None:
                continue
            in_hf, placed = _moved(held, piece.local_index, piece.hf_index), 0
            for place in places[piece.hf_name]:
                common = intersection(in_hf, place.hf_index)
                if common is not None:
                    placed += _elements(common)
                    _append(found, _shard(piece, place, common))
            if placed != _elements(held):
                raise ValueError(f"{piece.hf_name}: {placed} of {_elements(held)} elements in {in_hf} have a place")
    return found


def _shard(piece: Piece, place: Place, in_hf: Box) -> Shard:
    """`in_hf`: elements of the Hugging Face tensor that both have."""
    inside = [s.start for s in relative(in_hf, [s.start for s in place.hf_index])]
    axes = len(place.shape) - len(inside)
    offset = tuple(o + i for o, i in zip(place.offset, [0] * axes + inside, strict=True))
    return Shard(place.key, place.shape, offset, _moved(in_hf, piece.hf_index, piece.local_index))


def flat_boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """Elements [start, stop) of a flattened tensor as boxes, in order: a part of a row, whole rows, a part of a row."""
    if start >= stop:
        return
    if len(shape) == 1:
        yield (slice(start, stop),)
        return
    row = prod(shape[1:])
    first, last = -(-start // row), stop // row
    if first > last:
        yield from _row(shape, last, start, stop)
        return
    yield from _row(shape, first - 1, start, first * row)
    if first < last:
        yield (slice(first, last), *(slice(0, n) for n in shape[1:]))
    yield from _row(shape, last, last * row, stop)


def _row(shape: Sequence[int], number: int, start: int, stop: int) -> Iterator[Box]:
    """Elements [start, stop), all of one row."""
    origin = number * prod(shape[1:])
    return ((slice(number, number + 1), *box) for box in flat_boxes(shape[1:], start - origin, stop - origin))


def share(shapes: Sequence[Sequence[int]], parts: int, number: int) -> list[tuple[int, int]]:
    """For each tensor the flattened elements [start, stop) that belong to part `number`, when all tensors are laid end
    to end and divided into `parts` equal ones; rows of a tensor are not cut."""
    total = sum(map(prod, shapes))
    cuts = (total * number // parts, total * (number + 1) // parts)
    ranges, before = [], 0
    for shape in shapes:
        row, size = prod(shape[1:]), prod(shape)
        start, stop = (min(max(-(-(cut - before) // row) * row, 0), size) if size else 0 for cut in cuts)
        ranges.append((start, stop))
        before += size
    return ranges


def view(flat: torch.Tensor, start: int, shape: Sequence[int], box: Box) -> torch.Tensor:
    """The `box` of a tensor of this shape, of whose flattened elements `flat` has those from `start` on."""
    strides = [prod(shape[d + 1 :]) for d in range(len(shape))]
    first = sum(s.start * stride for s, stride in zip(box, strides, strict=True))
    return flat.as_strided([s.stop - s.start for s in box], strides, flat.storage_offset() + first - start)


def _elements(box: Box) -> int:
    return prod(s.stop - s.start for s in box)


def _moved(box: Box, origin: Box, target: Box) -> Box:
    """`box`, which lies in `origin`, at the same place of `target`."""
    return tuple(slice(s.start - o.start + t.start, s.stop - o.start + t.start)
                 for s, o, t in zip(box, origin, target, strict=True))


def _append(found: list[Shard], shard: Shard) -> None:
    """One box instead of two, where `shard` goes on where the last one ends in the parameter and in the checkpoint."""
    last = found[-1] if found else None
    axis = len(shard.shape) - len(shard.box)
    if last is not None and (last.key, last.box[1:]) == (shard.key, shard.box[1:]):
        rows = last.box[0].stop - last.box[0].start
        follows = tuple(o + rows * (d == axis) for d, o in enumerate(last.offset))
        if last.box[0].stop == shard.box[0].start and follows == shard.offset:
            joined = (slice(last.box[0].start, shard.box[0].stop), *shard.box[1:])
            found[-1] = Shard(last.key, last.shape, last.offset, joined)
            return
    found.append(shard)

"""Matrices in 8 bits with a scale for each block, as checkpoints have them (checkpointing/block_scaled.py reads these):

    NAME              float8_e4m3fn [rows, columns]
    NAME_scale_inv    float32 [⌈rows / block⌉, ⌈columns / block⌉]: what the elements of a block are multiplied with
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch.nn.functional import pad

from megatron_pbsd.boxes import Box
from megatron_pbsd.models.sglang import quantised
from megatron_pbsd.resharding.wire import BLOCK, FLOAT8, Wire

SCALE = "_scale_inv"


def quantise(matrix: torch.Tensor, block: tuple[int, int] = BLOCK) -> tuple[torch.Tensor, torch.Tensor]:
    """The two tensors. The largest element of a block becomes the largest number of 8 bits, 448 (DeepSeek-V3, arXiv
    2412.19437, section 3.3.2); a block of zeros has the scale 1."""
    (rows, columns), (high, wide) = matrix.shape, block
    # A row of blocks at a time, as single precision takes four times what is made.
    values = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=matrix.device)
    scales = torch.empty(-(-rows // high), -(-columns // wide), device=matrix.device)
    largest = torch.finfo(torch.float8_e4m3fn).max
    which = torch.arange(columns, device=matrix.device) // wide
    for row in range(len(scales)):
        part = matrix[row * high : (row + 1) * high].float()
        most = pad(part.abs().amax(0), (0, -columns % wide)).view(-1, wide).amax(1)
        scales[row] = torch.where(most > 0, most / largest, 1.0)
        values[row * high : (row + 1) * high] = (part / scales[row, which]).clamp_(-largest, largest).to(values.dtype)
    return values, scales


def blocks_of(box: Box, block: tuple[int, int] = BLOCK) -> Box:
    """Of the scales, those of this box, which consists of whole blocks but for the last ones of its tensor."""
    return tuple(slice(part.start // size, -(-part.stop // size)) for part, size in zip(box, block, strict=True))


def sent_as(name: str, box: Box, wire: Wire) -> Iterator[tuple[str, str, Box]]:
    """What tensor[box] is on the wire, in order: tensor, dtype, box."""
    yield name, wire.dtype, box
    if wire.block is not None:
        yield name + SCALE, "float32", blocks_of(box, wire.block)


def on_the_wire(part: torch.Tensor, wire: Wire) -> tuple[torch.Tensor, ...]:
    """Of what `sent_as` says, the numbers."""
    if wire.block is not None:
        return quantise(part, wire.block)
    return (part.to(getattr(torch, wire.dtype)),)


def in_8_bits(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What these, dtype and shape by name, are in a model of 8 bits: its projections with their scales."""
    made = {}
    for name, (dtype, shape) in tensors.items():
        made[name] = dtype, shape
        if quantised(name, shape):
            made[name] = FLOAT8, shape
            made[name + SCALE] = "float32", tuple(-(-n // size) for n, size in zip(shape, BLOCK, strict=True))
    return made


def same(part: torch.Tensor, name: str, box: Box, published: Mapping[str, torch.Tensor]) -> bool:
    """Whether the bytes of published[name][box] are those that `part` is sent as: in 8 bits, with its scales."""
    if published[name].dtype is not torch.float8_e4m3fn:
        return _equal(part, published[name][box])
    values, scales = quantise(part)
    return _equal(values, published[name][box]) and _equal(scales, published[name + SCALE][blocks_of(box)])


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit by bit: not a number is itself, and 0 is not -0."""
    return a.dtype == b.dtype and torch.equal(*(t.cpu().contiguous().view(-1).view(torch.uint8) for t in (a, b)))

"""Checksums of tensors that can be put together from those of their parts, wherever the parts are.

Σ A[row] · B[column] · x[row, column] modulo 2⁶⁴, where x are a tensor's bits as whole numbers, rows all axes but the
last, and A and B random odd numbers. So any one element that is another changes the sum, since odd numbers have
inverses; of other changes about one in 2⁶⁴ does not. The sum of a part needs nothing but the part and its place, and
parts that tile the tensor add up to the tensor's: the same sum of ones says whether they do.

Needs torch alone, on whatever device the tensor is: it is also loaded by its place, where this project is not there.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch

ROW, COLUMN = 1 << 40, 1 << 41
"""Where the sequences of A and B begin."""
BLOCK = 1 << 16
"""Elements at a time: 512 KiB as whole numbers, which stay in a core's cache."""
MODULUS = 1 << 64
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes of an element → what its bits are read as."""


def checksum(tensor: torch.Tensor) -> str:
    """Says dtype, shape and the sum of all bits: that of another tensor is the same if it is bit-identical, and
    otherwise with a chance of about 2⁻⁶⁴."""
    shape = tuple(tensor.shape)
    strides = [prod(shape[axis + 1 :]) for axis in range(len(shape))]
    return named(tensor.dtype, shape, part_sums(tensor, shape, 0, strides)[0])


def named(dtype: torch.dtype, shape: Sequence[int], total: int) -> str:
    """What `checksum` says."""
    return f"{str(dtype).removeprefix('torch.')}{list(shape)} {total % MODULUS:016x}"


def part_sums(part: torch.Tensor, shape: Sequence[int], offset: int, strides: Sequence[int]) -> tuple[int, int]:
    """Of a part of a tensor of this shape, modulo 2⁶⁴: the sum of its bits, and the same of ones.

    offset, strides: in elements, of the part in the tensor, which is contiguous: as of `tensor.as_strided(part.shape,
    strides, offset)`.
    """
    bits, columns = part.detach().view(BITS[part.element_size()]), shape[-1] if shape else 1
    axes = [axis for axis, size in enumerate(part.shape) if size > 1]
    across = [axis for axis in axes if strides[axis] % max(columns, 1)]
    along = [axis for axis in axes if axis not in across]
    first = offset % max(columns, 1)
    if not part.numel():
        return 0, 0
    if first + sum((part.shape[axis] - 1) * strides[axis] for axis in across) >= columns:
        return _sums_one_by_one(bits, columns, offset, strides)
    rows = _odd(offset // columns + _places(bits, along, strides) // columns + ROW)
    weights = _odd(first + _places(bits, across, strides) + COLUMN)
    numbers = bits.permute((*along, *across, *(a for a in range(part.dim()) if a not in axes))).reshape(len(rows), -1)
    step = max(1, BLOCK // len(weights))
    sums = torch.cat([(block.to(torch.int64) * weights).sum(1) for block in numbers.split(step)])
    return int((sums * rows).sum()) % MODULUS, int(rows.sum() * weights.sum()) % MODULUS


def ones(shape: Sequence[int], device: torch.device | str = "cpu") -> int:
    """The sum of ones of a whole tensor."""
    columns = shape[-1] if shape else 1
    rows = _odd(torch.arange(prod(shape[:-1]), device=device) + ROW)
    return int(rows.sum() * _odd(torch.arange(columns, device=device) + COLUMN).sum()) % MODULUS


def _places(bits: torch.Tensor, axes: Sequence[int], strides: Sequence[int]) -> torch.Tensor:
    """int64: places in the whole, less the first one's, along these axes, the last one's changing fastest."""
    found = torch.zeros(1, dtype=torch.int64, device=bits.device)
    for axis in axes:
        found = (found[:, None] + strides[axis] * torch.arange(bits.shape[axis], device=bits.device)).flatten()
    return found


def _sums_one_by_one(bits: torch.Tensor, columns: int, offset: int, strides: Sequence[int]) -> tuple[int, int]:
    """Of a part that is no box."""
    places = offset + _places(bits, range(bits.dim()), strides)
    weights = _odd(places // columns + ROW) * _odd(places % columns + COLUMN)
    return int((bits.reshape(-1).to(torch.int64) * weights).sum()) % MODULUS, int(weights.sum()) % MODULUS


def _odd(state: torch.Tensor) -> torch.Tensor:
    """Random odd numbers of int64 states, whose arithmetic wraps: SplitMix64 (Steele, Lea & Flood, OOPSLA 2014)."""
    mixed = state * _signed(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ _shifted(mixed, shift)) * _signed(factor)
    return (mixed ^ _shifted(mixed, 31)) | 1


def _shifted(number: torch.Tensor, by: int) -> torch.Tensor:
    """Towards lower bits, with zeros above."""
    return (number >> by) & ((1 << (64 - by)) - 1)


def _signed(number: int) -> int:
    return number - MODULUS if number >= MODULUS // 2 else number

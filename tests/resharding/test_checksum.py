"""Checksums of tensors against whole numbers in plain Python, and sums of parts against those of the whole."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from megatron_pbsd.resharding.checksum import COLUMN, MODULUS, ROW, checksum, named, ones, part_sums

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int64, torch.uint8, torch.bool)


def filled(shape, dtype=torch.float32, seed=0):
    count = torch.Size(shape).numel()
    made = torch.randint(256, (count * dtype.itemsize,), generator=torch.Generator().manual_seed(seed)).byte()
    return (made % 2 == 1 if dtype is torch.bool else made.view(dtype)).reshape(shape)


def odd(state):
    """SplitMix64 in whole numbers."""
    mixed = state * 0x9E3779B97F4A7C15 % MODULUS
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 % MODULUS
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB % MODULUS
    return (mixed ^ (mixed >> 31)) | 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 4), (7, 1), (1, 7), ()])
def test_the_sum_is_that_of_whole_numbers(dtype, shape):
    tensor = filled(shape, dtype)
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    columns = shape[-1] if shape else 1
    total = sum(odd(i // columns + ROW) * odd(i % columns + COLUMN) * x
                for i, x in enumerate(tensor.reshape(-1).view(integer).tolist()))
    assert checksum(tensor) == f"{str(dtype)[6:]}{list(shape)} {total % MODULUS:016x}"


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.data())
def test_any_other_bit_is_another_checksum(shape, data):
    tensor = filled(shape)
    bit = data.draw(st.integers(0, 31))
    changed = tensor.clone()
    at = data.draw(st.integers(0, tensor.numel() - 1))
    changed.view(torch.int32).view(-1)[at] ^= -2**31 if bit == 31 else 1 << bit
    assert checksum(changed) != checksum(tensor) == checksum(tensor.clone())


def test_elements_in_other_places_shapes_and_types_are_told():
    tensor = filled((64, 48))
    others = [tensor.flip(0), tensor.flip(1), tensor.roll(1, 0), tensor.roll(1, 1), tensor[torch.randperm(64)],
              tensor.view(48, 64), tensor.view(-1), tensor.view(torch.int32), -tensor, torch.zeros_like(tensor)]
    assert len({checksum(other) for other in (tensor, *others)}) == 1 + len(others)


def test_other_strides_are_the_same_elements():
    tensor = filled((6, 5, 8), torch.bfloat16)
    assert checksum(tensor.transpose(0, 2).contiguous().transpose(0, 2)) == checksum(tensor)
    assert checksum(torch.nn.Parameter(tensor)) == checksum(tensor)


@given(st.lists(st.integers(1, 7), min_size=1, max_size=3), st.sampled_from(DTYPES), st.data())
def test_parts_that_tile_add_up_and_others_do_not(shape, dtype, data):
    """Cut along one axis after the other, as tensor and expert parallelism do."""
    tensor = filled(shape, dtype)
    pieces = [tensor]
    for axis in data.draw(st.lists(st.integers(0, len(shape) - 1), max_size=3)):
        pieces = [part for piece in pieces for part in piece.tensor_split(data.draw(st.integers(1, 3)), axis)]
    sums = [part_sums(part.clone() if data.draw(st.booleans()) else part, shape, part.storage_offset(), part.stride())
            for part in pieces]
    assert named(dtype, shape, sum(bits for bits, _ in sums)) == checksum(tensor)
    assert sum(count for _, count in sums) % MODULUS == ones(shape)
    whole = [pair for part, pair in zip(pieces, sums, strict=True) if part.numel()]
    assert sum(count for _, count in whole[1:]) % MODULUS != ones(shape)
    assert sum(count for _, count in (*whole, whole[0])) % MODULUS != ones(shape)


@given(st.integers(0, 23), st.integers(1, 24))
def test_parts_that_are_no_boxes(start, length):
    """Some elements in a row, from the middle of one row of the tensor to that of another."""
    tensor = filled((6, 4))
    end = min(24, start + length)
    parts = [(a, tensor.view(-1)[a:b]) for a, b in ((0, start), (start, end), (end, 24))]
    sums = [part_sums(part, (6, 4), offset, part.stride()) for offset, part in parts]
    assert named(tensor.dtype, (6, 4), sum(bits for bits, _ in sums)) == checksum(tensor)
    assert sum(count for _, count in sums) % MODULUS == ones((6, 4))


def test_large_tensors_are_summed_in_pieces():
    tensor = filled((300, 1000), torch.bfloat16)
    halves = [part_sums(part, (300, 1000), part.storage_offset(), part.stride()) for part in tensor.tensor_split(2, 1)]
    assert named(tensor.dtype, (300, 1000), sum(bits for bits, _ in halves)) == checksum(tensor)
    assert checksum(tensor) != checksum(tensor.flip(0))


def test_nothing_has_a_checksum_too():
    assert checksum(torch.empty(0, 4)) != checksum(torch.empty(4, 0)) and ones((0, 4)) == 0

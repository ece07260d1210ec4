"""Boxes of a checkpoint's tensors: they cover what they should, once, and hold the right elements."""

from __future__ import annotations

from itertools import pairwise
from math import prod

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from tiny_models import tiny_config

from megatron_pbsd.config import ParallelConfig
from megatron_pbsd.learner.shards import flat_boxes, shards, share, view
from megatron_pbsd.models import family
from megatron_pbsd.models.dist_checkpoint import places
from megatron_pbsd.models.parameters import Piece, coordinates, local_shape

shapes = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)
CASES = [
    ("qwen3", {}, ParallelConfig(world_size=8, tp=2, pp=2)),
    ("qwen3", {"tie_word_embeddings": True}, ParallelConfig(world_size=8, tp=1, pp=2, vpp=2, cp=2)),
    ("qwen3_moe", {}, ParallelConfig(world_size=8, tp=2, pp=2, ep=2)),
    ("glm4_moe", {}, ParallelConfig(world_size=4, tp=2, ep=2, etp=2)),
]


@given(st.data())
def test_flat_boxes_have_the_elements_in_order(data):
    shape = data.draw(shapes)
    start = data.draw(st.integers(0, prod(shape)))
    stop = data.draw(st.integers(start, prod(shape)))
    whole = np.arange(prod(shape)).reshape(shape)
    found = [whole[box].ravel() for box in flat_boxes(shape, start, stop)]
    assert np.concatenate([*found, np.empty(0, int)]).tolist() == list(range(start, stop))
    assert all(box.size for box in found)
    # Every axis but the last may have a part of a row before and after.
    assert len(found) <= 2 * len(shape) - 1


@given(st.lists(shapes, min_size=1, max_size=6), st.integers(1, 7))
def test_shares_are_equal_but_for_a_row(tensors, parts):
    ranges = [share(tensors, parts, number) for number in range(parts)]
    for i, shape in enumerate(tensors):
        ends = [r[i] for r in ranges]
        covered = [(start, stop) for start, stop in ends if start < stop]
        assert sum(stop - start for start, stop in covered) == prod(shape)
        assert all(a[1] == b[0] for a, b in pairwise(covered))
        assert all(n % prod(shape[1:]) == 0 for pair in covered for n in pair)
    row = max(prod(shape[1:]) for shape in tensors)
    for mine in ranges:
        assert abs(sum(stop - start for start, stop in mine) - sum(map(prod, tensors)) / parts) <= row + 1


@pytest.mark.parametrize(("model_type", "changes", "parallel"), CASES)
def test_ranks_write_each_element_once_and_find_all_of_theirs(model_type, changes, parallel):
    """Brute force: every element of a checkpoint has a number; ranks get theirs by way of Hugging Face tensors."""
    hf = tiny_config(model_type, **changes)
    chosen = family(hf)
    stored = places(chosen.decoder(hf))
    numbers, tensors = numbered(stored, chosen.hf_tensors(hf))
    written = {key: np.zeros(values.shape, int) for key, values in numbers.items()}
    rng = np.random.default_rng(0)
    for rank in range(parallel.world_size):
        at = coordinates(parallel, rank)
        for chunk in range(parallel.vpp):
            for pieces in chosen.pieces(hf, parallel, at, chunk).values():
                shape = local_shape(pieces)
                local = torch.empty(shape, dtype=torch.int64)
                for piece in pieces:
                    local[piece.local_index] = tensors[piece.hf_name][piece.hf_index]
                start, stop = sorted(rng.integers(0, local.numel() + 1, 2))
                for first, last in ((0, local.numel()), (start, stop)):
                    flat = local.view(-1)[first:last].clone()
                    found = shards(pieces, stored, shape, first, last)
                    for shard in found:
                        values = view(flat, first, shape, shard.box)
                        assert (values.numpy() == numbers[shard.key][shard.stored_box].reshape(values.shape)).all()
                    assert sum(prod(shard.size) for shard in found) == last - first
                for shard in shards([p for p in pieces if p.primary], stored, shape, 0, local.numel()):
                    written[shard.key][shard.stored_box] += 1
    assert all((count == 1).all() for count in written.values())


def numbered(stored, hf_shapes):
    """A number for each element of the stored tensors, by key, and by Hugging Face name."""
    keys = {place.key: place.shape for parts in stored.values() for place in parts}
    numbers, count = {}, 0
    for key, shape in keys.items():
        numbers[key] = np.arange(count, count + prod(shape)).reshape(shape)
        count += prod(shape)
    tensors = {}
    for name, parts in stored.items():
        tensors[name] = torch.empty(hf_shapes[name], dtype=torch.int64)
        for place in parts:
            size = [s.stop - s.start for s in place.hf_index]
            axes = len(place.shape) - len(size)
            box = tuple(slice(o, o + n) for o, n in zip(place.offset, [1] * axes + size, strict=True))
            tensors[name][place.hf_index] = torch.from_numpy(numbers[place.key][box].reshape(size))
    return numbers, tensors


def test_what_goes_on_in_both_is_one_box():
    """All rows of an undivided query-key-value matrix, which Hugging Face has in three tensors."""
    hf = tiny_config("qwen3")
    chosen, one = family(hf), ParallelConfig(world_size=1, tp=1)
    pieces = chosen.pieces(hf, one, coordinates(one, 0), 0)["decoder.layers.0.self_attention.linear_qkv.weight"]
    [shard] = shards(pieces, places(chosen.decoder(hf)), local_shape(pieces), 0, prod(local_shape(pieces)))
    assert shard.box == tuple(slice(0, n) for n in local_shape(pieces)) and shard.shape == local_shape(pieces)


@settings(max_examples=20)
@given(st.integers(1, 6), st.integers(0, 3))
def test_rows_without_a_piece_are_left_out(rows, padding):
    hf = tiny_config("qwen3")
    stored = places(family(hf).decoder(hf))
    index = (slice(0, rows), slice(0, 32))
    piece = Piece("lm_head.weight", index, index, primary=True)
    found = shards([piece], stored, (rows + padding, 32), 5, (rows + padding) * 32)
    assert sum(prod(shard.size) for shard in found) == rows * 32 - 5


def test_an_element_without_a_place_is_named():
    hf = tiny_config("qwen3")
    stored = {name: parts[:1] for name, parts in places(family(hf).decoder(hf)).items()}
    index = (slice(0, 64), slice(0, 32))
    piece = Piece("model.layers.0.self_attn.q_proj.weight", index, index, primary=True)
    with pytest.raises(ValueError, match="q_proj.weight: 1024 of 2048 elements"):
        shards([piece], stored, (64, 32), 0, 64 * 32)

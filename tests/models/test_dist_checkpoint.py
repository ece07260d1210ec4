"""Where Hugging Face tensors lie in Megatron's checkpoints, by brute force; test_dist_checkpoint.py in distributed/
compares with what Megatron-core saves."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from tiny_models import TINY, tiny_config

from megatron_pbsd.config import ParallelConfig
from megatron_pbsd.models import family
from megatron_pbsd.models.dist_checkpoint import extra_states, has_layer_axis, places, rank_boxes, units
from tests.models.test_parameter_map import layouts


def decoder_of(model_type, **changes):
    hf = tiny_config(model_type, **changes)
    return family(hf).decoder(hf), family(hf).hf_tensors(hf)


def box_of(place):
    local = [s.stop - s.start for s in place.hf_index]
    sizes = [1] * (len(place.shape) - len(local)) + local
    return tuple(slice(o, o + n) for o, n in zip(place.offset, sizes, strict=True))


# Layers with and without experts share no tensors.
@pytest.mark.parametrize(("model_type", "layer_axis"), [
    *((name, False) for name in TINY),
    *((name, True) for name in TINY if decoder_of(name)[0].experts is None)])
@pytest.mark.parametrize("tied", [False, True])
def test_every_element_is_stored_once(model_type, tied, layer_axis):
    decoder, shapes = decoder_of(model_type, tie_word_embeddings=tied)
    found = places(decoder, layer_axis)
    assert found.keys() == shapes.keys()
    stored = {place.key: np.zeros(place.shape, int) for parts in found.values() for place in parts}
    for name, parts in found.items():
        read = np.zeros(shapes[name], int)
        for place in parts:
            assert stored[place.key].shape == place.shape
            read[place.hf_index] += 1
            stored[place.key][box_of(place)] += 1
        assert (read == 1).all(), name
    assert all((count == 1).all() for count in stored.values())
    assert has_layer_axis(stored) == layer_axis


@pytest.mark.parametrize("model_type", TINY)
@settings(max_examples=40)
@given(data=st.data())
def test_over_all_ranks_every_element_has_one_box(model_type, data):
    halves = {"rope_interleave": data.draw(st.booleans())} if model_type == "deepseek_v3" else {}
    decoder, _ = decoder_of(model_type, **halves)
    parallel = data.draw(layouts([1, 2], 16, experts=decoder.experts is not None))
    stored = {unit.key: np.zeros(unit.shape, int) for unit in units(decoder)}
    for rank in range(parallel.world_size):
        for key, box in rank_boxes(decoder, parallel, rank):
            stored[key][box] += 1
    assert all((count == 1).all() for count in stored.values())


def test_boxes_of_a_rank_are_few():
    """Rows of attention that lie one after another are one box."""
    decoder, _ = decoder_of("qwen3", num_hidden_layers=1)
    parallel = ParallelConfig(world_size=1, tp=1)
    boxes = list(rank_boxes(decoder, parallel, 0))
    assert len(boxes) == len({key for key, _ in boxes})


def test_units_are_filled_row_by_row():
    """Import and export read Hugging Face tensors in order, and whole rows of them."""
    for model_type in TINY:
        decoder, shapes = decoder_of(model_type)
        seen: dict[str, int] = {}
        for unit in units(decoder):
            row = 0
            for piece in unit.pieces:
                assert piece.local_index[0].start == row and piece.hf_index[0].start == seen.get(piece.hf_name, 0)
                row, seen[piece.hf_name] = piece.local_index[0].stop, piece.hf_index[0].stop
                assert piece.hf_index[1:] == tuple(slice(0, n) for n in shapes[piece.hf_name][1:])
            assert row == unit.local[0]
        assert seen == {name: shape[0] for name, shape in shapes.items()}


def test_extra_states_have_one_shard_per_expert():
    decoder, _ = decoder_of("qwen3_moe")
    found = extra_states(decoder)
    assert len(found) == len(set(found))
    assert "decoder.layers.0.mlp.experts.experts.linear_fc1._extra_state/shard_7_8" in found
    assert "decoder.layers.2.mlp.linear_fc2._extra_state/shard_0_1" in found
    assert "decoder.layers.1.self_attention.core_attention._extra_state/shard_0_1" in found
    assert not [key for key in found if "router" in key or "layer_norm" in key]

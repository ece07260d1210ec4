"""The parameter map over all ranks of a layout, by brute force."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from megatron_pbsd.config import ParallelConfig
from megatron_pbsd.models import ModelError, family, layout_problems
from megatron_pbsd.models.parameters import coordinates, local_shape


def hf_config(**changes):
    return {
        "model_type": "qwen3", "vocab_size": 16, "hidden_size": 6, "intermediate_size": 8, "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 2, "max_position_embeddings": 32,
        "rms_norm_eps": 1e-6, "initializer_range": 0.02, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, **changes}


layouts = st.builds(
    lambda tp, pp, dp: ParallelConfig(world_size=tp * pp * dp, tp=tp, pp=pp),
    st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2]))


@settings(deadline=None, max_examples=30)
@given(parallel=layouts, tied=st.booleans())
def test_primary_pieces_cover_every_element_once_and_locals_are_tiled(parallel, tied):
    hf = hf_config(tie_word_embeddings=tied)
    qwen3 = family(hf)
    written = {name: np.zeros(shape, int) for name, shape in qwen3.hf_tensors(hf).items()}
    for rank in range(parallel.world_size):
        for pieces in qwen3.pieces(hf, parallel, coordinates(parallel, rank)).values():
            local = np.zeros(local_shape(pieces), int)
            for piece in pieces:
                local[piece.local_index] += 1
                assert local[piece.local_index].shape == written[piece.hf_name][piece.hf_index].shape
                if piece.primary:
                    written[piece.hf_name][piece.hf_index] += 1
            assert (local == 1).all()
    for name, count in written.items():
        assert (count == 1).all(), name


def test_fused_qkv_is_interleaved_by_key_value_head():
    hf = hf_config()
    parallel = ParallelConfig(world_size=2, tp=2, pp=1)
    local = family(hf).pieces(hf, parallel, coordinates(parallel, 1))
    rows = [(p.hf_name.split(".")[-2], p.hf_index[0].start, p.hf_index[0].stop)
            for p in local["decoder.layers.0.self_attention.linear_qkv.weight"]]
    assert rows == [("q_proj", 8, 12), ("k_proj", 4, 6), ("v_proj", 4, 6),
                    ("q_proj", 12, 16), ("k_proj", 6, 8), ("v_proj", 6, 8)]


@pytest.mark.parametrize(("tp", "pp", "words"), [
    (8, 1, ["learner.parallel.tp = 8", "num_key_value_heads = 4", "[1, 2, 4]"]),
    (3, 1, ["learner.parallel.tp = 3", "vocab_size = 16"]),
    (1, 3, ["learner.parallel.pp = 3", "num_hidden_layers = 4", "[1, 2, 4]"]),
])
def test_layouts_that_do_not_divide_the_model_are_named(tp, pp, words):
    hf, parallel = hf_config(), ParallelConfig(world_size=tp * pp, tp=tp, pp=pp)
    (problem,) = layout_problems(hf, parallel)
    assert all(word in problem for word in words), problem
    with pytest.raises(ModelError, match="does not divide"):
        family(hf).pieces(hf, parallel, coordinates(parallel, 0))


@pytest.mark.parametrize(("change", "words"), [
    ({"model_type": "qwen4"}, "did you mean 'qwen3'"),
    ({"attention_bias": True}, "'attention_bias' = True is not implemented"),
    ({"hidden_size_": 3}, "'hidden_size_' = 3 is not known .* did you mean 'hidden_size'"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, "'rope_parameters.rope_type' = 'yarn'"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 1.0, "factor": 2}}, "'rope_parameters.factor'"),
    ({"layer_types": ["sliding_attention"] * 4}, "'layer_types'"),
    ({"sliding_window": 128, "use_sliding_window": True}, "'use_sliding_window'"),
    ({"rope_scaling": {"type": "yarn"}}, "'rope_scaling'"),
])
def test_fields_that_change_the_mathematics_are_errors(change, words):
    with pytest.raises(ModelError, match=words):
        family(hf_config(**change))


def test_missing_fields_are_all_named():
    hf = hf_config()
    del hf["head_dim"], hf["rms_norm_eps"]
    with pytest.raises(ModelError, match="'head_dim' is missing; 'rms_norm_eps' is missing"):
        family(hf)


def test_config_as_transformers_4_and_5_write_it():
    from transformers import Qwen3Config

    written = Qwen3Config(num_hidden_layers=2).to_dict()
    assert family(written).gpt_model(written)["rotary_base"] == written["rope_parameters"]["rope_theta"]
    older = hf_config(rope_theta=5e5, rope_scaling=None, torch_dtype="bfloat16")
    del older["rope_parameters"]
    assert family(older).gpt_model(older)["rotary_base"] == 5e5

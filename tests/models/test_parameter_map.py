"""The parameter map over all ranks and model chunks of a layout, by brute force; where ranks lie, by Megatron-core."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import assume, given, settings, strategies as st
from tiny_models import TINY, tiny_config

from megatron_pbsd.config import LearnerConfig, ParallelConfig
from megatron_pbsd.models import ModelError, family, layout_problems
from megatron_pbsd.models.parameters import Piece, coordinates, local_shape, paired, stage_layers, unpaired


@st.composite
def layouts(draw, sizes, most_ranks, experts=True):
    tp, cp, dp, pp = (draw(st.sampled_from(sizes)) for _ in range(4))
    stage = tp * cp * dp
    assume(stage * pp <= most_ranks)
    ep = draw(st.sampled_from([n for n in sizes if stage % n == 0])) if experts else 1
    etp = draw(st.sampled_from([n for n in sizes if stage // ep % n == 0])) if experts else 1
    vpp = draw(st.sampled_from([1, 2])) if pp > 1 else 1
    return ParallelConfig(world_size=stage * pp, tp=tp, cp=cp, pp=pp, vpp=vpp, ep=ep, etp=etp)


def assert_covered(hf, parallel):
    model = family(hf)
    written = {name: np.zeros(shape, int) for name, shape in model.hf_tensors(hf).items()}
    for rank in range(parallel.world_size):
        for chunk in range(parallel.vpp):
            for pieces in model.pieces(hf, parallel, coordinates(parallel, rank), chunk).values():
                local = np.zeros(local_shape(pieces), int)
                for piece in pieces:
                    local[piece.local_index] += 1
                    end = piece.local_index[0].stop
                    local[end : end + piece.padding] += 1
                    assert local[piece.local_index].shape == written[piece.hf_name][piece.hf_index].shape
                    if piece.primary:
                        written[piece.hf_name][piece.hf_index] += 1
                assert (local == 1).all()
    for name, count in written.items():
        assert (count == 1).all(), name


@pytest.mark.parametrize("model_type", TINY)
@settings(max_examples=100)
@given(data=st.data(), tied=st.booleans(), vocabulary=st.integers(4, 131))
def test_primary_pieces_cover_every_element_once_and_locals_are_tiled(model_type, data, tied, vocabulary):
    hf = tiny_config(model_type, tie_word_embeddings=tied, vocab_size=vocabulary)
    assert_covered(hf, data.draw(layouts([1, 2], 32, experts="moe" in model_type or model_type == "mixtral")))


@settings(max_examples=200)
@given(parallel=layouts([1, 2, 3, 4], 96))
def test_ranks_lie_where_megatron_puts_them(parallel):
    from megatron.core.parallel_state import RankGenerator

    order = "tp-cp-ep-dp-pp"
    dense = RankGenerator(tp=parallel.tp, ep=1, dp=parallel.dp, pp=parallel.pp, cp=parallel.cp, order=order)
    expert = RankGenerator(
        tp=parallel.etp, ep=parallel.ep, dp=parallel.expert_dp, pp=parallel.pp, cp=1, order=order)
    places = {"tp": (dense, "tp"), "cp": (dense, "cp"), "dp": (dense, "dp"), "pp": (dense, "pp"),
              "etp": (expert, "tp"), "ep": (expert, "ep"), "expert_dp": (expert, "dp")}
    for name, (generator, token) in places.items():
        for group in generator.get_ranks(token):
            assert [getattr(coordinates(parallel, rank), name) for rank in group] == list(range(len(group)))


def transformer_config(layers, parallel, **fields):
    import torch
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(
        num_layers=layers, hidden_size=8, num_attention_heads=1, pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp if parallel.vpp > 1 else None,
        pipeline_dtype=torch.float32, **fields)


@settings(max_examples=50)
@given(pp=st.integers(1, 5), vpp=st.integers(1, 4), each=st.integers(1, 3))
def test_layers_lie_where_megatron_puts_them(pp, vpp, each):
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    assume(pp > 1 or vpp == 1)
    layers, parallel = pp * vpp * each, ParallelConfig(world_size=pp, tp=1, pp=pp, vpp=vpp)
    config = transformer_config(layers, parallel)
    for rank in range(pp):
        for chunk in range(vpp):
            stage = chunk if vpp > 1 else None
            start = get_transformer_layer_offset(config, stage, rank)
            assert stage_layers(layers, parallel, rank, chunk) == range(
                start, start + get_num_layers_to_build(config, stage, rank))


@settings(max_examples=200)
@given(pp=st.integers(2, 8), vpp=st.integers(1, 4), layers=st.integers(2, 100))
def test_layers_that_stages_do_not_divide(pp, vpp, layers):
    """Each in its place, balanced over ranks, and as Megatron-core reads the layout that it is given."""
    from megatron.core.transformer.enums import LayerType

    assume(layers >= pp * vpp)
    hf = tiny_config("qwen3") | {"num_hidden_layers": layers}
    hf.pop("layer_types")
    parallel = ParallelConfig(world_size=pp, tp=1, pp=pp, vpp=vpp)
    assert not layout_problems(hf, parallel)
    held = {(chunk, rank): stage_layers(layers, parallel, rank, chunk) for chunk in range(vpp) for rank in range(pp)}
    assert [layer for stage in sorted(held) for layer in held[stage]] == list(range(layers))
    sizes = [len(stage) for stage in held.values()]
    ranks = [sum(len(held[chunk, rank]) for chunk in range(vpp)) for rank in range(pp)]
    assert max(sizes) - min(sizes) <= 1 and max(ranks) - min(ranks) <= 1
    assert sizes[-1] == min(sizes) and ranks[-1] == min(ranks)
    layout = transformer_config(
        layers, parallel,
        pipeline_model_parallel_layout=family(hf).pipeline_layout(hf, parallel)).pipeline_model_parallel_layout
    for (chunk, rank), stage in held.items():
        assert layout.layout[rank][chunk].count(LayerType.decoder) == len(stage)


@pytest.mark.parametrize(("layers", "pp", "vpp", "expected"), [
    (61, 4, 1, [[15], [15], [16], [15]]), (62, 4, 1, [[15], [16], [16], [15]]), (5, 2, 1, [[3], [2]]),
    (5, 4, 1, [[1], [1], [2], [1]]), (61, 4, 2, [[7, 8], [7, 8], [8, 8], [8, 7]]),
])
def test_where_the_longer_stages_are(layers, pp, vpp, expected):
    parallel = ParallelConfig(world_size=pp, tp=1, pp=pp, vpp=vpp)
    assert [[len(stage_layers(layers, parallel, rank, chunk)) for chunk in range(vpp)]
            for rank in range(pp)] == expected


@pytest.mark.parametrize(("model_type", "layout"), [
    *(("qwen2", layout) for layout in ({"pp": 4}, {"pp": 4, "vpp": 3}, {"tp": 2, "pp": 4}, {"pp": 60})),
    ("deepseek_v3", {"pp": 4, "tp": 2, "ep": 2}),
], ids=str)
def test_61_layers(model_type, layout):
    ranks = layout["pp"] * layout.get("tp", 1)
    special = {"qwen2": {"layer_types": ["full_attention"] * 61}, "deepseek_v3": {"first_k_dense_replace": 3}}
    hf = tiny_config(model_type, num_hidden_layers=61, vocab_size=131, **special[model_type])
    assert_covered(hf, ParallelConfig(**{"world_size": ranks, "tp": 1} | layout))


def local(hf, parallel, rank, chunk=0):
    return family(hf).pieces(hf, parallel, coordinates(parallel, rank), chunk)


@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_fused_qkv_is_interleaved_by_key_value_head(kind):
    hf = tiny_config("glm4_moe", num_attention_heads=8, num_key_value_heads=4, head_dim=4)
    second = local(hf, ParallelConfig(world_size=2, tp=2), 1)
    rows = [(p.hf_name.removeprefix("model.layers.0.self_attn."), p.hf_index[0].start, p.hf_index[0].stop)
            for p in second[f"decoder.layers.0.self_attention.linear_qkv.{kind}"]]
    assert rows == [(f"q_proj.{kind}", 16, 24), (f"k_proj.{kind}", 8, 12), (f"v_proj.{kind}", 8, 12),
                    (f"q_proj.{kind}", 24, 32), (f"k_proj.{kind}", 12, 16), (f"v_proj.{kind}", 12, 16)]


def test_halves_of_rotated_dimensions_lie_pair_by_pair():
    hf = tiny_config("deepseek_v3", rope_interleave=False)
    second = local(hf, ParallelConfig(world_size=2, tp=2), 1)
    rows = [(p.hf_index[0], p.local_index[0], p.primary)
            for p in second["decoder.layers.0.self_attention.linear_q_up_proj.weight"]]
    # Heads 2 and 3 of 24 rows, of which 16 have no position.
    assert rows == [
        (slice(48, 64), slice(0, 16), True), (slice(64, 68), slice(16, 24, 2), True),
        (slice(68, 72), slice(17, 24, 2), True), (slice(72, 88), slice(24, 40), True),
        (slice(88, 92), slice(40, 48, 2), True), (slice(92, 96), slice(41, 48, 2), True)]
    down = second["decoder.layers.0.self_attention.linear_kv_down_proj.weight"]
    assert [(p.hf_index[0], p.local_index[0], p.primary) for p in down] == [
        (slice(0, 12), slice(0, 12), False), (slice(12, 16), slice(12, 20, 2), False),
        (slice(16, 20), slice(13, 20, 2), False)]


@pytest.mark.parametrize("interleave", [True, False])
@pytest.mark.parametrize("rank", [None, 20])
@settings(max_examples=30)
@given(data=st.data())
def test_latent_attention_is_covered(interleave, rank, data):
    hf = tiny_config("deepseek_v3", q_lora_rank=rank, rope_interleave=interleave)
    assert_covered(hf, data.draw(layouts([1, 2], 32)))


def test_latent_attention_needs_its_heads_divided_only():
    hf = tiny_config("deepseek_v3", q_lora_rank=21, kv_lora_rank=13)
    assert not layout_problems(hf, ParallelConfig(world_size=4, tp=4))
    (problem,) = layout_problems(hf, ParallelConfig(world_size=8, tp=8))
    assert "num_attention_heads = 4; valid" in problem
    (problem,) = layout_problems(hf, ParallelConfig(world_size=2, tp=1, dynamic_cp=True))
    assert problem.startswith("learner.parallel.dynamic_cp = True is not for latent attention")


def test_experts_are_divided_over_ranks_and_each_over_its_tensor_parallel_ranks():
    hf = tiny_config("glm4_moe")
    parallel = ParallelConfig(world_size=8, tp=2, cp=2, ep=2, etp=2)
    rank = local(hf, parallel, 3)  # tp 1, cp 1, dp 0; etp 1, ep 1, expert dp 0
    up = rank["decoder.layers.1.mlp.experts.local_experts.2.linear_fc1.weight"]
    assert [(p.hf_name, p.hf_index[0], p.primary) for p in up] == [
        (f"model.layers.1.mlp.experts.6.{half}_proj.weight", slice(8, 16), True) for half in ("gate", "up")]
    (down,) = rank["decoder.layers.1.mlp.experts.local_experts.2.linear_fc2.weight"]
    assert down.hf_index == (slice(0, 32), slice(8, 16))
    (shared,) = rank["decoder.layers.1.mlp.shared_experts.linear_fc2.weight"]
    assert (shared.hf_index[1], shared.primary) == (slice(16, 32), False)
    for number, primary in ((0, True), (1, False), (4, False)):
        (bias,) = local(hf, parallel, number)["decoder.layers.1.mlp.router.expert_bias"]
        assert (bias.shape, bias.primary) == ((8,), primary)
    # From rank 4 on every rank is the second of two replicas.
    assert not any(p.primary for parts in local(hf, parallel, 4).values() for p in parts)


def test_first_and_last_chunk_hold_the_ends_of_the_model():
    hf = tiny_config("qwen3_moe", tie_word_embeddings=True)
    parallel = ParallelConfig(world_size=2, tp=1, pp=2, vpp=2)
    ends = {"embedding.word_embeddings.weight", "decoder.final_layernorm.weight", "output_layer.weight"}
    found = {(rank, chunk): ends & local(hf, parallel, rank, chunk).keys() for rank in (0, 1) for chunk in (0, 1)}
    assert found == {
        (0, 0): {"embedding.word_embeddings.weight"}, (0, 1): set(), (1, 0): set(),
        (1, 1): {"decoder.final_layernorm.weight", "output_layer.weight"}}
    # Layer 2 is dense; it is the second chunk of the first rank.
    assert "decoder.layers.0.mlp.linear_fc1.weight" in local(hf, parallel, 0, 1)


def test_vocabulary_is_padded_where_ranks_do_not_divide_it():
    hf, parallel = tiny_config("qwen3", vocab_size=131), ParallelConfig(world_size=2, tp=2)
    assert family(hf).gpt_model(hf, parallel)["vocab_size"] == 132
    for rank, rows, padding in ((0, slice(0, 66), 0), (1, slice(66, 131), 1)):
        for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
            (piece,) = local(hf, parallel, rank)[name]
            assert (piece.hf_index[0], piece.padding) == (rows, padding)
            assert local_shape([piece]) == (66, 32)


@settings(max_examples=300)
@given(vocabulary=st.integers(1, 200), tp=st.integers(1, 16))
def test_every_rank_holds_a_token_or_the_layout_is_refused(vocabulary, tp):
    hf = tiny_config("qwen3") | {"vocab_size": vocabulary, "num_attention_heads": tp, "num_key_value_heads": tp,
                                 "intermediate_size": tp}
    problems = layout_problems(hf, ParallelConfig(world_size=tp, tp=tp))
    each = -(-vocabulary // tp)
    held = [len(range(vocabulary)[rank * each : (rank + 1) * each]) for rank in range(tp)]
    assert bool(problems) == (0 in held)
    if problems:
        assert f"tp = {tp} leaves a rank without any of the vocab_size = {vocabulary}" in problems[0]
    if tp * tp <= vocabulary:
        assert not problems


@pytest.mark.parametrize(("model_type", "layout", "words"), [
    ("qwen3", {"tp": 4}, ["tp = 4 does not divide", "num_key_value_heads = 2", "[1, 2]"]),
    ("qwen3", {"tp": 3}, ["tp = 3 does not divide", "num_key_value_heads = 2", "num_attention_heads = 4"]),
    ("qwen3", {"tp": 1, "pp": 5}, ["pp = 5 is more than", "num_hidden_layers = 4", "1 … 4"]),
    ("qwen3", {"tp": 1, "pp": 2, "vpp": 4}, ["vpp = 4 makes pp * vpp = 8 stages", "num_hidden_layers = 4", "1 … 2"]),
    ("qwen3", {"tp": 2, "ep": 2}, ["ep = 2 divides experts", "has none", "[1]"]),
    ("qwen3", {"tp": 2, "etp": 2}, ["etp = 2 divides experts", "has none", "[1]"]),
    ("qwen3_moe", {"tp": 1, "cp": 3, "ep": 3}, ["ep = 3 does not divide num_experts = 8", "[1, 2, 4, 8]"]),
    ("glm4_moe", {"tp": 1, "cp": 3, "etp": 3}, ["etp = 3 does not divide moe_intermediate_size = 16"]),
])
def test_layouts_that_do_not_divide_the_model_are_named(model_type, layout, words):
    hf = tiny_config(model_type)
    ranks = layout.get("tp", 1) * layout.get("cp", 1) * layout.get("pp", 1)
    parallel = ParallelConfig(world_size=ranks, **layout)
    (problem,) = layout_problems(hf, parallel)
    assert problem.startswith("learner.parallel.")
    assert all(word in problem for word in words), problem
    with pytest.raises(ModelError, match="valid for this model"):
        local(hf, parallel, 0)


def test_only_lengths_that_occur_must_be_divisible():
    everywhere = {"num_experts": 8, "mlp_only_layers": [], "intermediate_size": 49}
    assert not layout_problems(tiny_config("qwen3_moe", **everywhere), ParallelConfig(world_size=2, tp=2))
    (problem,) = layout_problems(tiny_config("qwen3_moe", intermediate_size=49), ParallelConfig(world_size=2, tp=2))
    assert "intermediate_size = 49" in problem
    shared = tiny_config("glm4_moe", n_shared_experts=1, moe_intermediate_size=15)
    (problem,) = layout_problems(shared, ParallelConfig(world_size=2, tp=2))
    assert "shared_intermediate_size = 15" in problem
    assert not layout_problems(shared, ParallelConfig(world_size=3, tp=1, cp=3))


@pytest.mark.parametrize(("model", "changes", "words"), [
    ("qwen3", {"moe": {"routing_replay": True}}, "learner.moe.routing_replay = True is for experts, .* has none"),
    ("qwen3", {"moe": {"aux_loss_coefficient": 0.1}}, "learner.moe.aux_loss_coefficient = 0.1 .* set it to 0"),
    ("qwen3_moe", {"moe": {"expert_bias_update_rate": 0.001}}, "moe.expert_bias_update_rate = 0.001 moves a bias"),
    ("glm4_moe", {"parallel": {"tp": 2, "sequence_parallel": False}}, "sequence_parallel = False with tp = 2"),
])
def test_keys_that_a_model_cannot_heed_are_named(model, changes, words):
    hf = tiny_config(model)
    (problem,) = family(hf).learner_problems(hf, LearnerConfig.model_validate(changes))
    assert re.search(words, problem), problem
    assert not family(tiny_config("glm4_moe")).learner_problems(tiny_config("glm4_moe"), LearnerConfig.model_validate(
        {"moe": {"routing_replay": True, "aux_loss_coefficient": 0.1, "expert_bias_update_rate": 0.001}}))


def test_halves_that_alternate_are_one_piece_between_layouts():
    name, rows = "q", 24
    indices = [(slice(start, start + 8), slice(0, 2)) for start in range(0, rows, 8)]
    heads = [Piece(name, index, index, primary=True) for index in indices]
    for plain in (0, 2):
        parts = [part for head in heads for part in paired(head, plain)]
        joined = unpaired(parts)
        assert len(parts) == 3 * (2 + bool(plain)) and len(joined) == 3 * (1 + bool(plain))
        held = np.full((rows, 2), -1)
        for part in joined:
            assert part.hf_index == part.local_index, "heads lie in both as they do here"
            held[part.local_index] += 1
        assert (held == 0).all()
    assert unpaired(heads) == heads

"""Families as they are published: config.json of well-known checkpoints is read, and the totals are theirs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from megatron_pbsd.config import ParallelConfig
from megatron_pbsd.models import ModelError, family
from megatron_pbsd.models.parameters import coordinates

COMMON = {
    "attention_dropout": 0.0, "hidden_act": "silu", "initializer_range": 0.02, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": True,
    "bos_token_id": 1, "eos_token_id": [2, 3]}
SMOLLM2 = COMMON | {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "attention_bias": False, "hidden_size": 576,
    "initializer_range": 0.041666666666666664, "intermediate_size": 1536, "is_llama_config": True,
    "max_position_embeddings": 8192, "mlp_bias": False, "num_attention_heads": 9, "num_hidden_layers": 30,
    "num_key_value_heads": 3, "pad_token_id": 2, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_interleaved": False, "rope_scaling": None, "rope_theta": 100000, "tie_word_embeddings": True,
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}, "vocab_size": 49152}
LLAMA = COMMON | {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "attention_bias": False, "mlp_bias": False,
    "max_position_embeddings": 131072, "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0, "vocab_size": 128256,
    "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3",
                     "original_max_position_embeddings": 8192}}
QWEN2 = COMMON | {
    "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "max_position_embeddings": 32768,
    "rope_theta": 1000000.0, "sliding_window": 131072, "use_mrope": False, "use_sliding_window": False}
MISTRAL = COMMON | {
    "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 32768, "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0,
    "sliding_window": None}
GLM = COMMON | {
    "model_type": "glm4_moe", "architectures": ["Glm4MoeForCausalLM"], "attention_bias": True, "pad_token_id": 151329,
    "head_dim": 128, "partial_rotary_factor": 0.5, "max_position_embeddings": 131072, "norm_topk_prob": True,
    "num_attention_heads": 96, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "num_experts_per_tok": 8,
    "num_key_value_heads": 8, "num_nextn_predict_layers": 1, "rms_norm_eps": 1e-05, "rope_scaling": None,
    "rope_theta": 1000000, "vocab_size": 151552}
SHAPES = {path.stem: json.loads(path.read_text()) for path in (Path(__file__).parents[2] / "configs/models").iterdir()}
"""Those that come with recipes."""
DEEPSEEK, KIMI = SHAPES["deepseek_v3"], SHAPES["kimi_k2"]
"""Without their quantization_config."""

CHECKPOINTS: dict[str, tuple[dict[str, Any], int]] = {
    "SmolLM2-135M": (SMOLLM2, 134_515_008),
    "Llama-3.1-8B": (LLAMA | {
        "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_hidden_layers": 32},
        8_030_261_248),
    "Llama-3.1-70B": (LLAMA | {
        "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_hidden_layers": 80},
        70_553_706_496),
    "Llama-3.2-1B": (SHAPES["llama_3_2_1b"], 1_235_814_400),
    "Qwen2.5-0.5B": (QWEN2 | {
        "hidden_size": 896, "intermediate_size": 4864, "max_window_layers": 24, "num_attention_heads": 14,
        "num_hidden_layers": 24, "num_key_value_heads": 2, "tie_word_embeddings": True, "vocab_size": 151936},
        494_032_768),
    "Qwen2.5-7B": (QWEN2 | {
        "hidden_size": 3584, "intermediate_size": 18944, "max_window_layers": 28, "num_attention_heads": 28,
        "num_hidden_layers": 28, "num_key_value_heads": 4, "vocab_size": 152064}, 7_615_616_512),
    "Qwen3-1.7B": (SHAPES["qwen3_1_7b"], 1_720_574_976),
    "Qwen3-8B": (SHAPES["qwen3_8b"], 8_190_735_360),
    "Qwen3-30B-A3B": (SHAPES["qwen3_30b_a3b"], 30_532_122_624),
    "Qwen3-235B-A22B": (SHAPES["qwen3_235b_a22b"], 235_093_634_560),
    "Mistral-7B-v0.3": (MISTRAL | {"model_type": "mistral", "vocab_size": 32768}, 7_248_023_552),
    "Mixtral-8x7B": (SHAPES["mixtral_8x7b"], 46_702_792_704),
    "GLM-4.5": (GLM | {
        "first_k_dense_replace": 3, "hidden_size": 5120, "intermediate_size": 12288, "moe_intermediate_size": 1536,
        "n_routed_experts": 160, "num_hidden_layers": 92, "routed_scaling_factor": 2.5, "use_qk_norm": True},
        358_337_791_296),
    "GLM-4.5-Air": (GLM | {
        "first_k_dense_replace": 1, "hidden_size": 4096, "intermediate_size": 10944, "moe_intermediate_size": 1408,
        "n_routed_experts": 128, "num_hidden_layers": 46, "routed_scaling_factor": 1.0, "use_qk_norm": False},
        110_468_824_832),
    "DeepSeek-V3": (DEEPSEEK, 684_489_845_504),
    "Kimi-K2": (KIMI, 1_026_408_232_448),
}
"""Name → config.json, and how many elements the tensors of the checkpoint have, not counting scales of 8-bit floats."""


def main_model(hf: dict[str, Any]) -> int:
    return sum(math.prod(shape) for shape in family(hf).hf_tensors(hf).values())


def predictor(hf: dict[str, Any]) -> int:
    """Elements of one layer for multi-token prediction (DeepSeek-V3, arXiv 2412.19437, section 2.2): a layer like the
    last, a projection of two normalised vectors, a norm after it; checkpoints repeat embedding and output layer."""
    hidden = hf["hidden_size"]
    last = f"model.layers.{hf['num_hidden_layers'] - 1}."
    layer = sum(math.prod(shape) for name, shape in family(hf).hf_tensors(hf).items() if name.startswith(last))
    return layer + 2 * hidden * hidden + 3 * hidden + 2 * hf["vocab_size"] * hidden


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_parameters_are_as_many_as_in_the_checkpoint(name):
    hf, total = CHECKPOINTS[name]
    assert main_model(hf) + hf.get("num_nextn_predict_layers", 0) * predictor(hf) == total


def test_671_billion_are_deepseek_v3_without_multi_token_prediction():
    assert main_model(DEEPSEEK) == 671_026_419_200
    assert family(DEEPSEEK).ignored_tensor(DEEPSEEK, "model.layers.61.mlp.gate.weight")
    assert not family(KIMI).ignored_tensor(KIMI, "model.layers.61.mlp.gate.weight")
    assert family(KIMI).ignored_tensor(KIMI, "model.layers.0.self_attn.rotary_emb.inv_freq")


@pytest.mark.parametrize("hf", [DEEPSEEK, KIMI], ids=["DeepSeek-V3", "Kimi-K2"])
def test_8_bit_weights_are_to_be_converted(hf):
    quantized = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    with pytest.raises(ModelError, match="'quantization_config' = .* is not implemented; .*pbsd convert"):
        family(hf | {"quantization_config": quantized})


def test_61_layers_over_four_stages_with_experts_over_eight_ranks():
    parallel = ParallelConfig(world_size=32, tp=8, pp=4, ep=8)
    model, spoken_for, dense, sparse = family(DEEPSEEK), 0, [], []
    for rank in range(parallel.world_size):
        parts = model.pieces(DEEPSEEK, parallel, coordinates(parallel, rank), 0)
        spoken_for += sum(math.prod(piece.shape) for pieces in parts.values() for piece in pieces if piece.primary)
        dense.append(sum(name.endswith(".mlp.linear_fc1.weight") for name in parts))
        sparse.append(sum(name.endswith(".router.weight") for name in parts))
    assert spoken_for == main_model(DEEPSEEK)
    assert (dense[::8], sparse[::8]) == ([3, 0, 0, 0], [12, 15, 16, 15])


def test_three_key_value_heads():
    (problem,) = family(SMOLLM2).layout_problems(SMOLLM2, ParallelConfig(world_size=2, tp=2))
    assert problem.startswith("learner.parallel.tp = 2 does not divide")
    assert "num_key_value_heads = 3" in problem and "[1, 3]" in problem
    assert not family(SMOLLM2).layout_problems(SMOLLM2, ParallelConfig(world_size=3, tp=3))

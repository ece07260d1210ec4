"""The cost model counts what torch's operation counter counts in transformers' models, forward and backward."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_pbsd.learner.cost import Cost

SHAPES = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 3,
          "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 128}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LATENT = {
    "kv_lora_rank": 48, "qk_nope_head_dim": 24, "qk_rope_head_dim": 8, "v_head_dim": 20, "head_dim": 8,
    "num_key_value_heads": 4, "n_routed_experts": 8, "n_shared_experts": 2, "first_k_dense_replace": 1, "n_group": 1,
    "topk_group": 1}
MODELS = {
    "qwen3": {},
    "llama": {"head_dim": 16},
    "qwen3_moe": {**EXPERTS, "mlp_only_layers": [1]},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 40, "head_dim": 16, "decoder_sparse_step": 2},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "glm4_moe": {**EXPERTS, "n_routed_experts": 8, "n_shared_experts": 2, "first_k_dense_replace": 1},
    "deepseek_v3": {**EXPERTS, **LATENT, "q_lora_rank": 40},
    "deepseek_v3, queries without a latent": {**EXPERTS, **LATENT, "q_lora_rank": None},
}


@pytest.mark.parametrize("positions", [16, 64])
@pytest.mark.parametrize("model", MODELS)
def test_operations_of_a_training_pass(model, positions):
    config = AutoConfig.for_model(model.partition(",")[0], **{**SHAPES, **MODELS[model]})
    # Attention and experts in plain matrix products, which the counter knows.
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager")
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, positions, dtype=torch.long), logits_to_keep=positions // 2).logits.sum().backward()
    cost = Cost.of(config.to_dict(), predicted=0.5)
    # Eager attention computes what the causal mask then hides: twice the operations.
    assert counter.get_total_flops() == cost.linear * positions + 2 * cost.quadratic * positions**2


def test_arrays_are_costed_element_by_element():
    cost = Cost(linear=3.0, quadratic=0.5)
    assert cost(np.array([2.0, 4.0])).tolist() == [cost(2.0), cost(4.0)] == [8.0, 20.0]


def test_a_missing_field_is_named():
    with pytest.raises(KeyError, match="num_hidden_layers"):
        Cost.of({"hidden_size": 8})

"""The cost model counts what torch's operation counter counts in transformers' models, forward and backward."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import tiny_config
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_pbsd.learner.cost import Cost
from megatron_pbsd.models import family

MODELS = [
    ("qwen3", {}), ("qwen3", {"head_dim": 32, "num_key_value_heads": 4}),
    ("qwen3_moe", {}), ("qwen3_moe", {"decoder_sparse_step": 2, "mlp_only_layers": [], "num_experts_per_tok": 3}),
    ("glm4_moe", {}), ("glm4_moe", {"n_shared_experts": 1, "first_k_dense_replace": 3}),
    ("deepseek_v3", {}), ("deepseek_v3", {"q_lora_rank": None, "v_head_dim": 20}),
]


@pytest.mark.parametrize("positions", [16, 64])
@pytest.mark.parametrize(("model_type", "changes"), MODELS, ids=str)
def test_operations_of_a_training_pass(model_type, changes, positions):
    hf = tiny_config(model_type, **changes)
    config = AutoConfig.for_model(**hf)
    # Attention and experts in plain matrix products, which the counter knows.
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager")
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, positions, dtype=torch.long), logits_to_keep=positions // 2).logits.sum().backward()
    cost = Cost.of(family(hf).decoder(hf), predicted=0.5)
    # Eager attention computes what the causal mask then hides: twice the operations.
    assert counter.get_total_flops() == cost.linear * positions + 2 * cost.quadratic * positions**2


def test_arrays_are_costed_element_by_element():
    cost = Cost(linear=3.0, quadratic=0.5)
    assert cost(np.array([2.0, 4.0])).tolist() == [cost(2.0), cost(4.0)] == [8.0, 20.0]

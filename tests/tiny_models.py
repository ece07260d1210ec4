"""Tiny models of every family, written by transformers."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

COMMON = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "rms_norm_eps": 1e-6,
    "initializer_range": 0.1, "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 16,
    "beta_fast": 4.0, "beta_slow": 1.0, "mscale": 0.7, "mscale_all_dim": 1.0}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64}
"""Of a head's eight frequencies it leaves one, blends two and slows five down."""
MOE = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
TINY: dict[str, dict[str, Any]] = {
    "llama": COMMON | {"rope_parameters": LLAMA3},
    "mistral": COMMON | {"sliding_window": None},
    "mixtral": COMMON | {"num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen2": {name: value for name, value in COMMON.items() if name != "head_dim"},
    "qwen3": COMMON,
    "qwen3_moe": COMMON | MOE | {"num_experts": 8, "norm_topk_prob": True, "mlp_only_layers": [2]},
    "glm4_moe": COMMON | MOE | {
        "n_routed_experts": 8, "n_shared_experts": 2, "first_k_dense_replace": 1, "routed_scaling_factor": 1.5,
        "attention_bias": True, "use_qk_norm": True},
    "deepseek_v3": COMMON | MOE | {
        "num_key_value_heads": 4, "head_dim": 8, "q_lora_rank": 20, "kv_lora_rank": 12, "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8, "v_head_dim": 12, "n_routed_experts": 8, "n_shared_experts": 2,
        "first_k_dense_replace": 1, "routed_scaling_factor": 2.5, "n_group": 4, "topk_group": 2,
        "num_experts_per_tok": 4, "rope_parameters": YARN},
}
"""model_type → configuration."""


def tiny_config(model_type: str, **changes: Any) -> dict[str, Any]:
    """What config.json says of `TINY[model_type]` with these fields changed; a change to ... leaves the field out."""
    given = {name: value for name, value in changes.items() if value is not ...}
    written = _config(model_type, given).to_dict() | given
    return {name: value for name, value in written.items() if changes.get(name) is not ...}


def make_tiny(model_type: str, folder: Path, seed: int = 0, **changes: Any) -> Path:
    """`folder`, now with a model in Hugging Face format of which no weight has the value that new models start with.

    changes: configuration fields that differ from `TINY[model_type]`.
    """
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(_config(model_type, changes))
    biases = [buffer for name, buffer in model.named_buffers() if name.endswith("bias")]
    with torch.no_grad():
        for tensor in (*model.parameters(), *biases):
            tensor.add_(torch.randn_like(tensor) * 0.1)
    model.save_pretrained(folder)
    return folder


def _config(model_type: str, changes: dict[str, Any]):
    from transformers import AutoConfig

    # transformers writes into what it is given.
    return AutoConfig.for_model(model_type, **deepcopy(TINY[model_type] | changes))

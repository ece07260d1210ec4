"""Qwen3-MoE: Qwen3 with experts in some or all layers."""

from __future__ import annotations

from collections.abc import Mapping
from types import NoneType
from typing import Any

from megatron_pbsd.models import qwen3
from megatron_pbsd.models.decoder import Decoder, Experts
from megatron_pbsd.models.hf_config import (
    DECODER_REQUIRED,
    FieldRule,
    checked,
    decoder_values,
    either,
    flag,
    ignored,
    mapped,
    only,
    rope,
    whole,
)

REQUIRED = ("decoder_sparse_step", "mlp_only_layers", "moe_intermediate_size", "num_experts_per_tok", "norm_topk_prob")
COUNT = ("num_experts", "num_local_experts")
"""transformers 4 writes the first, 5 the second."""

FIELDS: Mapping[str, FieldRule] = {
    **qwen3.FIELDS,
    "model_type": only("qwen3_moe"),
    **{name: whole() for name in ("decoder_sparse_step", "moe_intermediate_size", "num_experts_per_tok", *COUNT)},
    "mlp_only_layers": mapped(list, NoneType),
    "norm_topk_prob": flag(),
    # learner.moe decides how experts are balanced.
    "router_aux_loss_coef": ignored(),
    "output_router_logits": ignored(),
}


def check_fields(hf: Mapping[str, Any]) -> None:
    """See `Family`."""
    checked(hf, FIELDS, (*DECODER_REQUIRED, *REQUIRED))


def decoder(hf: Mapping[str, Any]) -> Decoder:
    """See `Family`."""
    dense = hf["mlp_only_layers"] or []
    experts = Experts(
        layers=tuple(layer not in dense and (layer + 1) % hf["decoder_sparse_step"] == 0
                     for layer in range(hf["num_hidden_layers"])),
        num_experts=either(hf, *COUNT),
        num_experts_per_tok=hf["num_experts_per_tok"],
        moe_intermediate_size=hf["moe_intermediate_size"],
        scores="softmax",
        norm_topk_prob=hf["norm_topk_prob"])
    return Decoder(**decoder_values(hf), **rope(hf), qk_norm=True, experts=experts)

"""GLM-4.5-MoE: leading dense layers, then experts chosen by biased sigmoid scores beside shared ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_pbsd.models.decoder import Decoder, Experts
from megatron_pbsd.models.errors import ModelError
from megatron_pbsd.models.hf_config import (
    DECODER_FIELDS,
    DECODER_REQUIRED,
    FieldRule,
    checked,
    decoder_values,
    either,
    ignored,
    mapped,
    only,
    rope,
)

REQUIRED = (
    "attention_bias", "use_qk_norm", "first_k_dense_replace", "moe_intermediate_size", "num_experts_per_tok",
    "norm_topk_prob", "routed_scaling_factor", "n_group", "topk_group", "n_shared_experts")
COUNT = ("n_routed_experts", "num_local_experts")
MTP = ("num_nextn_predict_layers", "num_mtp_layers")
ROTARY_FACTOR = 0.5
"""Where config.json has no partial_rotary_factor."""

FIELDS: Mapping[str, FieldRule] = {
    **DECODER_FIELDS,
    "model_type": only("glm4_moe"),
    **{name: mapped() for name in (*REQUIRED, *COUNT, *MTP, "partial_rotary_factor")},
    # learner.moe decides how experts are balanced.
    "output_router_logits": ignored(),
}


def check_fields(hf: Mapping[str, Any]) -> None:
    """See `Family`."""
    checked(hf, FIELDS, (*DECODER_REQUIRED, *REQUIRED))
    if hf["n_shared_experts"] < 1:
        raise ModelError(f"config.json: 'n_shared_experts' = {hf['n_shared_experts']} is not implemented; "
                         "supported: 1 and more")


def decoder(hf: Mapping[str, Any]) -> Decoder:
    """See `Family`."""
    rotary = rope(hf, ("partial_rotary_factor",))
    experts = Experts(
        layers=tuple(layer >= hf["first_k_dense_replace"] for layer in range(hf["num_hidden_layers"])),
        num_experts=either(hf, *COUNT),
        num_experts_per_tok=hf["num_experts_per_tok"],
        moe_intermediate_size=hf["moe_intermediate_size"],
        scores="sigmoid",
        norm_topk_prob=hf["norm_topk_prob"],
        routed_scaling_factor=hf["routed_scaling_factor"],
        n_group=hf["n_group"],
        topk_group=hf["topk_group"],
        score_bias=True,
        shared_intermediate_size=hf["n_shared_experts"] * hf["moe_intermediate_size"])
    return Decoder(
        **decoder_values(hf),
        rotary_factor=rotary.pop("partial_rotary_factor", ROTARY_FACTOR),
        **rotary,
        qk_norm=hf["use_qk_norm"],
        qkv_bias=hf["attention_bias"],
        experts=experts,
        mtp_layers=either(hf, *MTP))

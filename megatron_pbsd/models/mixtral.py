"""Mixtral: Mistral with experts in every layer, under names of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_pbsd.models import mistral
from megatron_pbsd.models.decoder import Decoder, ExpertNames, Experts
from megatron_pbsd.models.hf_config import (
    DECODER_REQUIRED,
    FieldRule,
    checked,
    decoder_values,
    ignored,
    only,
    rope,
    whole,
)

REQUIRED = ("num_local_experts", "num_experts_per_tok")
NAMES = ExpertNames("block_sparse_moe", gate="w1", up="w3", down="w2")

FIELDS: Mapping[str, FieldRule] = {
    **mistral.FIELDS,
    "model_type": only("mixtral"),
    **{name: whole() for name in REQUIRED},
    "router_jitter_noise": only(0),
    # learner.moe decides how experts are balanced.
    "router_aux_loss_coef": ignored(),
    "output_router_logits": ignored(),
}


def check_fields(hf: Mapping[str, Any]) -> None:
    """See `Family`."""
    checked(hf, FIELDS, (*DECODER_REQUIRED, *REQUIRED))


def decoder(hf: Mapping[str, Any]) -> Decoder:
    """See `Family`. The width of an expert is 'intermediate_size'."""
    experts = Experts(
        layers=(True,) * hf["num_hidden_layers"],
        num_experts=hf["num_local_experts"],
        num_experts_per_tok=hf["num_experts_per_tok"],
        moe_intermediate_size=hf["intermediate_size"],
        scores="softmax",
        norm_topk_prob=True,
        names=NAMES)
    return Decoder(**decoder_values(hf), **rope(hf), qk_norm=False, experts=experts)

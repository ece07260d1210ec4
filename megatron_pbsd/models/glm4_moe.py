"""GLM-4.5: grouped-query attention; leading dense layers and experts as DeepSeek-V3 has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_pbsd.models.decoder import Decoder
from megatron_pbsd.models.deepseek_v3 import MTP, ROUTING, ROUTING_FIELDS, grouped_experts
from megatron_pbsd.models.hf_config import (
    DECODER_FIELDS,
    DECODER_REQUIRED,
    FieldRule,
    checked,
    decoder_values,
    either,
    flag,
    number,
    only,
    rope,
    whole,
)

REQUIRED = ("attention_bias", "use_qk_norm", *ROUTING)
ROTARY_FACTOR = 0.5
"""Where config.json has no partial_rotary_factor."""

FIELDS: Mapping[str, FieldRule] = {
    **DECODER_FIELDS,
    **ROUTING_FIELDS,
    "model_type": only("glm4_moe"),
    "head_dim": whole(),
    "partial_rotary_factor": number(),
    **{name: flag() for name in ("attention_bias", "use_qk_norm")},
}


def check_fields(hf: Mapping[str, Any]) -> None:
    """See `Family`."""
    checked(hf, FIELDS, (*DECODER_REQUIRED, *REQUIRED))


def decoder(hf: Mapping[str, Any]) -> Decoder:
    """See `Family`."""
    rotary = rope(hf, ("partial_rotary_factor",))
    return Decoder(
        **decoder_values(hf),
        rotary_factor=rotary.pop("partial_rotary_factor", ROTARY_FACTOR),
        **rotary,
        qk_norm=hf["use_qk_norm"],
        qkv_bias=hf["attention_bias"],
        experts=grouped_experts(hf),
        mtp_layers=either(hf, *MTP))

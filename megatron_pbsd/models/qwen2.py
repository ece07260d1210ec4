"""Qwen2 and Qwen2.5 (dense): queries, keys and values have biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_pbsd.models.decoder import Decoder
from megatron_pbsd.models.hf_config import (
    DECODER_FIELDS,
    DECODER_REQUIRED,
    FieldRule,
    checked,
    decoder_values,
    full_attention,
    ignored,
    only,
    rope,
)

FIELDS: Mapping[str, FieldRule] = {
    **DECODER_FIELDS,
    "model_type": only("qwen2"),
    "use_sliding_window": only(False),
    "use_mrope": only(False),
    # These two speak only where use_sliding_window is true.
    "sliding_window": ignored(),
    "max_window_layers": ignored(),
}


def check_fields(hf: Mapping[str, Any]) -> None:
    """See `Family`."""
    checked(hf, {**FIELDS, "layer_types": full_attention(hf)}, DECODER_REQUIRED)


def decoder(hf: Mapping[str, Any]) -> Decoder:
    """See `Family`."""
    return Decoder(**decoder_values(hf), **rope(hf), qk_norm=False, qkv_bias=True)

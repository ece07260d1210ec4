"""Llama 3, and what shares its model_type: SmolLM2."""

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
    ignored,
    only,
    rope,
)

FIELDS: Mapping[str, FieldRule] = {
    **DECODER_FIELDS,
    "model_type": only("llama"),
    "attention_bias": only(False),
    "mlp_bias": only(False),
    # Into how many products a matrix was once cut; the result is the same.
    "pretraining_tp": ignored(),
    # SmolLM2: what wrote the checkpoint, its order of rotated dimensions, and settings of another runtime.
    "is_llama_config": only(True),
    "rope_interleaved": only(False),
    "transformers.js_config": ignored(),
}


def check_fields(hf: Mapping[str, Any]) -> None:
    """See `Family`."""
    checked(hf, FIELDS, DECODER_REQUIRED)


def decoder(hf: Mapping[str, Any]) -> Decoder:
    """See `Family`."""
    return Decoder(**decoder_values(hf), **rope(hf), qk_norm=False)

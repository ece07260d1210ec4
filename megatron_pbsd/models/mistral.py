"""Mistral with attention over the whole sequence: 7B from version 0.2 on, and its successors."""

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
    only,
    rope,
)

FIELDS: Mapping[str, FieldRule] = {
    **DECODER_FIELDS,
    "model_type": only("mistral"),
    "sliding_window": only(None),
}


def check_fields(hf: Mapping[str, Any]) -> None:
    """See `Family`. Where config.json has no 'sliding_window', transformers takes one of 4096 tokens."""
    checked(hf, FIELDS, (*DECODER_REQUIRED, "sliding_window"))


def decoder(hf: Mapping[str, Any]) -> Decoder:
    """See `Family`."""
    return Decoder(**decoder_values(hf), **rope(hf), qk_norm=False)

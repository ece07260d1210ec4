"""Kimi-K2: DeepSeek-V3's architecture and fields under a name of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_pbsd.models import deepseek_v3
from megatron_pbsd.models.decoder import Decoder
from megatron_pbsd.models.hf_config import FieldRule, only

FIELDS: Mapping[str, FieldRule] = {**deepseek_v3.FIELDS, "model_type": only("kimi_k2")}


def check_fields(hf: Mapping[str, Any]) -> None:
    """See `Family`."""
    deepseek_v3.check_fields(hf, FIELDS)


def decoder(hf: Mapping[str, Any]) -> Decoder:
    """See `Family`."""
    return deepseek_v3.decoder(hf)

"""Model families by Hugging Face `model_type`. Pure: imports neither Megatron nor torch.distributed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_pbsd.config import ParallelConfig
from megatron_pbsd.errors import did_you_mean
from megatron_pbsd.models import (
    deepseek_v3,
    glm4_moe,
    kimi_k2,
    llama,
    mistral,
    mixtral,
    qwen2,
    qwen3,
    qwen3_moe,
)
from megatron_pbsd.models.errors import ModelError
from megatron_pbsd.models.family import Family

__all__ = ["Family", "ModelError", "family", "layout_problems"]

FAMILIES: Mapping[str, Family] = {
    "llama": Family(llama.check_fields, llama.decoder),
    "mistral": Family(mistral.check_fields, mistral.decoder),
    "mixtral": Family(mixtral.check_fields, mixtral.decoder),
    "qwen2": Family(qwen2.check_fields, qwen2.decoder),
    "qwen3": Family(qwen3.check_fields, qwen3.decoder),
    "qwen3_moe": Family(qwen3_moe.check_fields, qwen3_moe.decoder),
    "glm4_moe": Family(glm4_moe.check_fields, glm4_moe.decoder),
    "deepseek_v3": Family(deepseek_v3.check_fields, deepseek_v3.decoder),
    "kimi_k2": Family(kimi_k2.check_fields, kimi_k2.decoder),
}


def family(hf: Mapping[str, Any]) -> Family:
    """The family of a config.json, whose every field it has accounted for. ModelError when it cannot."""
    name = hf.get("model_type")
    if name not in FAMILIES:
        raise ModelError(f"config.json: model_type = {name!r} is not implemented; have {sorted(FAMILIES)}"
                         + did_you_mean(str(name), FAMILIES))
    chosen = FAMILIES[name]
    chosen.check_config(hf)
    return chosen


def layout_problems(hf: Mapping[str, Any], parallel: ParallelConfig) -> list[str]:
    """What stands in the way of dividing this model like this; empty when nothing does."""
    return family(hf).layout_problems(hf, parallel)

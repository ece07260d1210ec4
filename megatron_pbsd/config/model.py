"""Which model the policy is."""

from __future__ import annotations

from typing import Literal

from megatron_pbsd.config.section import Section


class ModelConfig(Section):
    path: str
    """Folder in Hugging Face format: config.json, model.safetensors, tokenizer.json."""
    initial_weights: Literal["load", "random"] = "load"
    """`random` starts from the config alone, by the run's seed (base-policy training)."""

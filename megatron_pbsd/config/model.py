"""Which model the policy is."""

from __future__ import annotations

from typing import Literal

from megatron_pbsd.config.section import Section


class ModelConfig(Section):
    path: str
    """Folder in Hugging Face format: config.json, model.safetensors, tokenizer.json."""
    shape: str | None = None
    """A file like config.json, with which a configuration is checked and planned on machines that do not have `path`;
    where both are there, they must agree. `configs/models` has those of published models."""
    initial_weights: Literal["load", "random"] = "load"
    """`random` starts from the config alone, by the run's seed (base-policy training)."""

"""Credit assignment: pure functions from rewards and evidence to advantages. One file per algorithm."""

from __future__ import annotations

from megatron_pbsd.algorithms.grpo import GRPO
from megatron_pbsd.algorithms.pbsd import PBSD
from megatron_pbsd.algorithms.protocol import Algorithm, Credit, Outcome
from megatron_pbsd.config import GRPOConfig, PBSDConfig

__all__ = ["Algorithm", "Credit", "Outcome", "build_algorithm"]


def build_algorithm(config: GRPOConfig | PBSDConfig) -> Algorithm:
    return {"grpo": GRPO, "pbsd": PBSD}[config.name](config)

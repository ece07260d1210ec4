"""Credit assignment: pure functions from rewards and evidence to advantages. One file per algorithm."""

from __future__ import annotations

from megatron_pbsd.algorithms.cispo import CISPO
from megatron_pbsd.algorithms.dapo import DAPO
from megatron_pbsd.algorithms.distill import Distill
from megatron_pbsd.algorithms.dr_grpo import DrGRPO
from megatron_pbsd.algorithms.grpo import GRPO
from megatron_pbsd.algorithms.gspo import GSPO
from megatron_pbsd.algorithms.pbsd import PBSD
from megatron_pbsd.algorithms.ppo import PPO
from megatron_pbsd.algorithms.protocol import Algorithm, Credit, Need, Outcome
from megatron_pbsd.algorithms.reinforce_pp import ReinforcePP
from megatron_pbsd.algorithms.rloo import RLOO
from megatron_pbsd.config import PolicyGradientConfig

__all__ = ["Algorithm", "Credit", "Need", "Outcome", "build_algorithm"]

ALGORITHMS = {
    "cispo": CISPO, "dapo": DAPO, "distill": Distill, "dr_grpo": DrGRPO, "grpo": GRPO, "gspo": GSPO, "pbsd": PBSD,
    "ppo": PPO, "reinforce_pp": ReinforcePP, "rloo": RLOO,
}


def build_algorithm(config: PolicyGradientConfig) -> Algorithm:
    """The algorithm that `config.name` selects."""
    return ALGORITHMS[config.name](config)

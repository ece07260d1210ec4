"""GRPO: every token of a trajectory gets its outcome advantage."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_pbsd.algorithms.advantages import group_relative
from megatron_pbsd.algorithms.protocol import Algorithm, Credit, Outcome, groups_of, rewards_of, uniform
from megatron_pbsd.config import GRPOConfig


class GRPO(Algorithm):
    """`A = (r - mean of its group) / std of its group` (arXiv 2402.03300, section 4.1.2)."""

    def __init__(self, config: GRPOConfig):
        self.config = config

    def assign(self, outcomes: Sequence[Outcome]) -> Credit:
        return uniform(outcomes, group_relative(rewards_of(outcomes), groups_of(outcomes), self.config.normalise_std))

"""Dr. GRPO: GRPO without the two biases of its normalisation."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_pbsd.algorithms.advantages import group_relative
from megatron_pbsd.algorithms.protocol import Algorithm, Credit, Outcome, groups_of, rewards_of, uniform
from megatron_pbsd.config import DrGRPOConfig


class DrGRPO(Algorithm):
    """`A = r - mean of its group` (arXiv 2503.20783, section 3.2). Division by the standard deviation favours prompts
    that are too easy or too hard; division by a trajectory's own length, which the loss must not do either, favours
    long failures."""

    def __init__(self, config: DrGRPOConfig):
        self.config = config

    def assign(self, outcomes: Sequence[Outcome]) -> Credit:
        return uniform(outcomes, group_relative(rewards_of(outcomes), groups_of(outcomes), normalise_std=False))

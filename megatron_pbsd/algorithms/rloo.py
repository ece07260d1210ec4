"""RLOO: REINFORCE with the other trajectories of the group as baseline."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_pbsd.algorithms.advantages import leave_one_out
from megatron_pbsd.algorithms.protocol import Algorithm, Credit, Outcome, groups_of, rewards_of, uniform
from megatron_pbsd.config import RLOOConfig


class RLOO(Algorithm):
    """`A = r - mean of the others of its group` (arXiv 2402.14740)."""

    def __init__(self, config: RLOOConfig):
        self.config = config

    def assign(self, outcomes: Sequence[Outcome]) -> Credit:
        return uniform(outcomes, leave_one_out(rewards_of(outcomes), groups_of(outcomes)))

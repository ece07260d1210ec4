"""DAPO: GRPO's advantages of rewards that punish length. Clipping is the loss's, sampling the loop's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from megatron_pbsd.algorithms.advantages import group_relative
from megatron_pbsd.algorithms.protocol import Algorithm, Credit, Outcome, groups_of, rewards_of, uniform
from megatron_pbsd.algorithms.rewards import overlong_penalty
from megatron_pbsd.config import DAPOConfig


class DAPO(Algorithm):
    """`A = (r + R_length - mean of its group) / std of its group` (arXiv 2503.14476, eq. 9 and 13)."""

    def __init__(self, config: DAPOConfig):
        self.config = config

    def assign(self, outcomes: Sequence[Outcome]) -> Credit:
        rewards, metrics = rewards_of(outcomes), {}
        if self.config.overlong_tokens is not None:
            penalties = np.array([overlong_penalty(o.tokens, self.config.overlong_tokens, self.config.overlong_cache)
                                  for o in outcomes])
            rewards = rewards + penalties
            metrics = {"credit/overlong_penalty": float(penalties.mean())}
        advantages = group_relative(rewards, groups_of(outcomes), self.config.normalise_std)
        return replace(uniform(outcomes, advantages), metrics=metrics)

"""REINFORCE++: no group needed; advantages are compared with those of the whole batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_pbsd.algorithms.advantages import batch_normalised, group_relative
from megatron_pbsd.algorithms.protocol import Algorithm, Credit, Outcome, groups_of, rewards_of
from megatron_pbsd.algorithms.rewards import kl_metrics, kl_needs, token_rewards
from megatron_pbsd.config import ReinforcePPConfig


class ReinforcePP(Algorithm):
    """`A_t = r - kl_penalty sum_{i >= t} (log pi_old - log pi_reference)`, normalised over the batch's tokens
    (arXiv 2501.03262, eq. 8 to 10). With `group_baseline`, r is first compared with the mean of its group."""

    def __init__(self, config: ReinforcePPConfig):
        self.config = config
        self.needs = kl_needs(config.kl_penalty)

    def assign(self, outcomes: Sequence[Outcome]) -> Credit:
        config, rewards = self.config, rewards_of(outcomes)
        if config.group_baseline:
            rewards = group_relative(rewards, groups_of(outcomes), normalise_std=False)
        to_go = [np.cumsum(token_rewards(o, r, config.kl_penalty)[::-1])[::-1]
                 for o, r in zip(outcomes, rewards, strict=True)]
        advantages = [a.astype(np.float32) for a in batch_normalised(to_go)]
        return Credit(advantages, metrics=kl_metrics(outcomes, config.kl_penalty))

"""PPO: advantages from a value head by generalised advantage estimation."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from megatron_pbsd.algorithms.advantages import batch_normalised
from megatron_pbsd.algorithms.protocol import Algorithm, Credit, Outcome, rewards_of
from megatron_pbsd.algorithms.rewards import kl_metrics, kl_needs, token_rewards
from megatron_pbsd.config import PPOConfig


class PPO(Algorithm):
    """The outcome reward comes with the last generated token (arXiv 1707.06347, 1506.02438).

    Time runs over generated tokens only: after the last token of a turn comes the first of the next, and the
    observation between them is part of the state, not a step of its own. What a limit cut short counts as ended.
    """

    def __init__(self, config: PPOConfig):
        self.config = config
        self.needs = kl_needs(config.kl_penalty) | {"values"}

    def assign(self, outcomes: Sequence[Outcome]) -> Credit:
        config, advantages, returns = self.config, [], []
        for outcome, reward in zip(outcomes, rewards_of(outcomes), strict=True):
            values = outcome.given("values")
            rewards = token_rewards(outcome, reward, config.kl_penalty)
            advantage = generalised_advantages(rewards, values, config.gamma, config.gae_lambda)
            advantages.append(advantage)
            returns.append(advantage + values)
        if config.whiten:
            advantages = batch_normalised(advantages)
        return Credit([a.astype(np.float32) for a in advantages],
                      metrics=kl_metrics(outcomes, config.kl_penalty),
                      returns=[r.astype(np.float32) for r in returns])


def generalised_advantages(rewards: np.ndarray, values: np.ndarray, gamma: float, gae_lambda: float) -> np.ndarray:
    """`A_t = sum_{l >= 0} (gamma lambda)^l delta_{t+l}`, `delta_t = r_t + gamma V_{t+1} - V_t`, V = 0 after the end
    (GAE, arXiv 1506.02438, eq. 11 and 16).

    rewards, values, result: float64 [n].
    """
    deltas = rewards + gamma * np.append(values[1:], 0.0) - values if len(values) else np.zeros(0)
    decay = gamma * gae_lambda
    return np.array(list(accumulate(deltas[::-1].tolist(), lambda later, delta: delta + decay * later)))[::-1]

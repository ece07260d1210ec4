"""GRPO: every token of a trajectory gets its outcome advantage."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_pbsd.algorithms.advantages import group_relative
from megatron_pbsd.algorithms.protocol import Credit, Outcome
from megatron_pbsd.config import GRPOConfig


class GRPO:
    needs_teacher = False

    def __init__(self, config: GRPOConfig):
        self.config = config

    def assign(self, outcomes: Sequence[Outcome]) -> Credit:
        advantages = group_relative(
            [o.reward for o in outcomes], [o.group_id for o in outcomes], self.config.normalise_std)
        return Credit([np.full(len(o.turn_index), a, np.float32) for o, a in zip(outcomes, advantages, strict=True)])

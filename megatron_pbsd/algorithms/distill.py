"""On-policy self-distillation: each token is credited with what the privileged teacher thinks of it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_pbsd.algorithms.advantages import group_relative
from megatron_pbsd.algorithms.protocol import Algorithm, Credit, Outcome, groups_of, rewards_of
from megatron_pbsd.config import DistillConfig


class Distill(Algorithm):
    """`A_t = outcome_weight A - coefficient (log pi_student - log pi_teacher)`.

    On tokens that the student sampled, the policy gradient of the second term is that of the reverse KL divergence
    from the teacher (on-policy distillation: GKD, arXiv 2306.13649; MiniLLM, arXiv 2306.08543).
    """

    needs = frozenset({"student", "teacher"})

    def __init__(self, config: DistillConfig):
        self.config = config

    def assign(self, outcomes: Sequence[Outcome]) -> Credit:
        config, advantages, gaps = self.config, [], []
        relative = group_relative(rewards_of(outcomes), groups_of(outcomes), config.normalise_std)
        for outcome, advantage in zip(outcomes, relative, strict=True):
            gap = outcome.given("student") - outcome.given("teacher")
            taught = ~outcome.answer_mask if config.exclude_answer_span else np.ones(outcome.tokens, bool)
            gaps.append(gap[taught])
            credit = config.outcome_weight * advantage - config.coefficient * np.where(taught, gap, 0.0)
            advantages.append(credit.astype(np.float32))
        taught_gaps = np.concatenate(gaps)
        return Credit(advantages, metrics={
            "credit/kl_teacher": float(taught_gaps.mean()) if len(taught_gaps) else 0.0})

"""PBSD: the outcome advantage of a trajectory, redistributed over its turns by their evidence (docs/pbsd.md)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_pbsd.algorithms.advantages import group_relative
from megatron_pbsd.algorithms.evidence import Evidence, turn_evidence
from megatron_pbsd.algorithms.protocol import Algorithm, Credit, Outcome, groups_of, rewards_of, uniform
from megatron_pbsd.config import PBSDConfig


class PBSD(Algorithm):
    needs = frozenset({"student", "teacher"})
    ends_in_loss = True

    def __init__(self, config: PBSDConfig):
        self.config = config

    def outcome_advantages(self, outcomes: Sequence[Outcome]) -> np.ndarray:
        return group_relative(rewards_of(outcomes), groups_of(outcomes), self.config.normalise_std)

    def begin(self, outcomes: Sequence[Outcome]) -> Credit:
        return uniform(outcomes, self.outcome_advantages(outcomes))

    def assign(self, outcomes: Sequence[Outcome]) -> Credit:
        config = self.config
        outcome_advantages = self.outcome_advantages(outcomes)
        evidences = [turn_evidence(o, config.exclude_answer_span) for o in outcomes]
        advantages, kept, clipped, spread = [], [], [], []
        for outcome, evidence, advantage in zip(outcomes, evidences, outcome_advantages, strict=True):
            centred, passed = centred_evidence(evidence, config.normalise_length, config.snr_gate)
            raw = np.exp(np.sign(advantage) * np.where(passed, centred, 0.0) / config.temperature)
            bounded = np.clip(raw, 1 - config.epsilon, 1 + config.epsilon)
            tokens = np.bincount(outcome.turn_index, minlength=outcome.turns)
            multipliers = bounded / (np.average(bounded, weights=tokens) if outcome.turns else 1.0)
            advantages.append((advantage * multipliers)[outcome.turn_index].astype(np.float32))
            kept.extend(passed)
            clipped.extend(raw != bounded)
            spread.extend(abs(multipliers - 1))
        return Credit(advantages, [e.turns for e in evidences], {
            "credit/evidence_per_token": _mean([e.turns.sum() / max(e.tokens.sum(), 1) for e in evidences]),
            "credit/evidence_solved": _mean([e.turns.sum() for e, a in zip(evidences, outcome_advantages) if a > 0]),
            "credit/evidence_failed": _mean([e.turns.sum() for e, a in zip(evidences, outcome_advantages) if a < 0]),
            "credit/snr_kept": _mean(kept),
            "credit/clip_fraction": _mean(clipped),
            "credit/multiplier_deviation": _mean(spread),
        })


def centred_evidence(evidence: Evidence, normalise_length: bool, snr_gate: float) -> tuple[np.ndarray, np.ndarray]:
    """Evidence centred over the trajectory, and which turns stand out from the noise.

    E_student[delta] = -KL <= 0, so raw sums drift down with length: with `normalise_length` c_k is the turn's mean
    per token minus the trajectory's mean per token, else the sum minus what n_k average tokens would have summed to.
    A turn passes the gate if |c_k| exceeds `snr_gate` standard errors of that quantity.

    Returns (c [K] float64, passed [K] bool). Turns without scored tokens have c = 0 and do not pass.
    """
    n = evidence.tokens
    if n.sum() == 0:
        return np.zeros(len(n)), np.zeros(len(n), bool)
    centred_sum = evidence.turns - n * (evidence.turns.sum() / n.sum())
    scale = np.maximum(n, 1) if normalise_length else 1.0
    noise = evidence.spread * np.sqrt(n) / scale
    centred = centred_sum / scale
    return centred, (n > 0) & (abs(centred) > snr_gate * noise)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else 0.0

"""PBSD: the outcome advantage of a trajectory, redistributed over its turns by their evidence (docs/pbsd.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
        multipliers = [turn_multipliers(e, a, config) for e, a in zip(evidences, outcome_advantages, strict=True)]
        advantages = [
            (advantage * m.values)[outcome.turn_index].astype(np.float32)
            for outcome, m, advantage in zip(outcomes, multipliers, outcome_advantages, strict=True)]
        return Credit(advantages, [e.turns for e in evidences], {
            "credit/evidence_per_token": _mean([e.turns.sum() / max(e.tokens.sum(), 1) for e in evidences]),
            "credit/evidence_solved": _mean([e.turns.sum() for e, a in zip(evidences, outcome_advantages) if a > 0]),
            "credit/evidence_failed": _mean([e.turns.sum() for e, a in zip(evidences, outcome_advantages) if a < 0]),
            "credit/snr_kept": _mean([kept for m in multipliers for kept in m.passed]),
            "credit/clip_fraction": _mean([clipped for m in multipliers for clipped in m.clipped]),
            "credit/multiplier_deviation": _mean([abs(value - 1) for m in multipliers for value in m.values]),
        })


@dataclass(frozen=True)
class Multipliers:
    """By turn, […, K]. values: float64, what the outcome advantage is multiplied by; their mean over the trajectory's
    tokens is 1. passed: bool, the SNR gate let the turn's evidence through. clipped: bool, epsilon bounds it."""

    values: np.ndarray
    passed: np.ndarray
    clipped: np.ndarray


def turn_multipliers(evidence: Evidence, advantage: np.ndarray | float, config: PBSDConfig) -> Multipliers:
    """From evidence to multipliers (docs/pbsd.md, 'From evidence to advantages'), here and nowhere else.

    `advantage` […] is the outcome advantage of each trajectory, of which only the sign counts. A trajectory may have
    turns without tokens, such as padding to K.
    """
    centred, passed = centred_evidence(evidence, config.normalise_length, config.snr_gate)
    raw = np.exp(np.sign(advantage)[..., None] * np.where(passed, centred, 0.0) / config.temperature)
    bounded = np.clip(raw, 1 - config.epsilon, 1 + config.epsilon)
    tokens = np.maximum(evidence.generated.sum(-1, keepdims=True), 1)
    mean = (bounded * evidence.generated).sum(-1, keepdims=True) / tokens
    return Multipliers(bounded / np.where(mean > 0, mean, 1.0), passed, raw != bounded)


def centred_evidence(evidence: Evidence, normalise_length: bool, snr_gate: float) -> tuple[np.ndarray, np.ndarray]:
    """Evidence centred over the trajectory, and which turns stand out from the noise.

    E_student[delta] = -KL <= 0, so raw sums drift down with length: with `normalise_length` c_k is the turn's mean
    per token minus the trajectory's mean per token, else the sum minus what n_k average tokens would have summed to.
    A turn passes the gate if |c_k| exceeds `snr_gate` standard errors of that quantity.

    Returns (c […, K] float64, passed […, K] bool). Turns without scored tokens have c = 0 and do not pass.
    """
    n = evidence.tokens
    per_token = evidence.turns.sum(-1, keepdims=True) / np.maximum(n.sum(-1, keepdims=True), 1)
    centred_sum = evidence.turns - n * per_token
    scale = np.maximum(n, 1) if normalise_length else 1.0
    noise = np.asarray(evidence.spread)[..., None] * np.sqrt(n) / scale
    centred = centred_sum / scale
    return centred, (n > 0) & (abs(centred) > snr_gate * noise)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else 0.0

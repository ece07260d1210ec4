"""Corrections for the mismatch between learner and rollout engine.

Tokens are drawn by the engine (pi_rollout), and the learner computes other probabilities for them under the very
same weights (pi_old). Each correction is a weight per token of the policy objective, without gradient, from
rho_t = pi_old / pi_rollout; rho_seq is the product of rho_t over the whole sequence:

    none                 1
    token_tis            min(rho_t, cap)                        F. Yao et al., 'Your efficient RL framework secretly
                                                                brings you off-policy RL training', 2025
    sequence_tis         min(rho_seq, cap)                      J. Liu, Y. Li et al., 'When speed kills stability', 2025
    sequence_mis         rho_seq if low <= rho_seq <= high else 0                              the same
    icepop               rho_t if low <= rho_t <= high else 0   Ring-1T, arXiv 2510.18855
    geometric_rejection  1 if low <= rho_seq^(1/T) <= high else 0   'When speed kills stability', part 3

A token of weight 0 still counts in the reduction: masking makes a step smaller, not the other tokens louder.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_pbsd.config import MismatchConfig
from megatron_pbsd.losses.inputs import LossInputs


@dataclass(frozen=True)
class Correction:
    """weights: float32 [N]. clipped, masked: bool [N], where the weight was cut to the cap, or to 0."""

    weights: torch.Tensor
    clipped: torch.Tensor
    masked: torch.Tensor

    def sums(self) -> dict[str, torch.Tensor]:
        """For metrics, over the tokens; `with_sample_size` turns their means into what is reported."""
        return {
            "loss/mismatch_weight": self.weights.sum(),
            SQUARED: (self.weights**2).sum(),
            "loss/mismatch_clipped": self.clipped.sum(),
            "loss/mismatch_masked": self.masked.sum(),
        }


SQUARED = "loss/mismatch_weight_squared"
SAMPLE_SIZE = "loss/mismatch_sample_size"


def correct(inputs: LossInputs, config: MismatchConfig) -> Correction:
    """Weights of the tokens; reads the field `rollout_log_probs`."""
    log_ratio = inputs["old_log_probs"] - inputs["rollout_log_probs"]
    ones = torch.ones_like(log_ratio)
    match config.name:
        case "none":
            return Correction(ones, ones < 1, ones < 1)
        case "token_tis" | "icepop":
            ratio = log_ratio.exp()
        case "sequence_tis" | "sequence_mis":
            ratio = inputs.over_sequence(log_ratio).exp()[inputs.sequence]
        case "geometric_rejection":
            ratio = inputs.sequence_mean(log_ratio).exp()[inputs.sequence]
    if config.name in ("token_tis", "sequence_tis"):
        return Correction(ratio.clamp(max=config.cap), ratio > config.cap, ones < 1)
    masked = (ratio < config.low) | (ratio > config.high)
    weights = ones if config.name == "geometric_rejection" else ratio
    return Correction(torch.where(masked, 0.0, weights), ones < 1, masked)


def with_sample_size(metrics: dict[str, float]) -> dict[str, float]:
    """Kong's effective sample size of the weights, (sum w)^2 / (N sum w^2), as a share of the N tokens."""
    metrics = dict(metrics)
    squared = metrics.pop(SQUARED)
    return metrics | {SAMPLE_SIZE: metrics["loss/mismatch_weight"] ** 2 / squared if squared else 0.0}

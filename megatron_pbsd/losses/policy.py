"""Clipped policy-gradient loss with a correction for the mismatch between learner and rollout engine."""

from __future__ import annotations

import torch

from megatron_pbsd.config import PolicyLossConfig
from megatron_pbsd.losses.inputs import LossInputs, LossOutput

FIELDS = ("advantages", "old_log_probs", "rollout_log_probs")


def k3(log_ratio: torch.Tensor) -> torch.Tensor:
    """KL(p || q) per sample of p from log_ratio = log q - log p (Schulman, 'Approximating KL divergence', k3)."""
    return torch.expm1(log_ratio) - log_ratio


def policy_loss(inputs: LossInputs, config: PolicyLossConfig) -> LossOutput:
    """Weighted mean over tokens of

        - w min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + kl_coefficient k3 - entropy_coefficient H

    with r = pi / pi_old (PPO, arXiv 1707.06347, eq. 7; decoupled bounds and token mean from DAPO, arXiv 2503.14476)
    and w = min(pi_old / pi_rollout, mismatch_cap), the truncated importance weight of each token.
    """
    advantages, old_log_probs, rollout_log_probs = (inputs[name] for name in FIELDS)
    log_ratio = inputs.log_probs - old_log_probs
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    objective = torch.minimum(ratio * advantages, clipped * advantages)
    mismatch = old_log_probs - rollout_log_probs
    weight = mismatch.exp().clamp(max=config.mismatch_cap)
    per_token = -weight * objective
    if config.kl_coefficient:
        per_token = per_token + config.kl_coefficient * k3(-log_ratio)
    if config.entropy_coefficient:
        per_token = per_token - config.entropy_coefficient * inputs.entropy
    loss = (per_token * inputs.weights).sum()

    with torch.no_grad():
        active = clipped * advantages < ratio * advantages
        sums = {
            "loss/total": loss,
            "loss/ratio_mean": ratio.sum(),
            "loss/clip_fraction": active.sum(),
            "loss/entropy": inputs.entropy.sum(),
            "loss/kl_old": k3(-log_ratio).sum(),
            "loss/kl_rollout": k3(mismatch).sum(),
            "loss/mismatch_weight": weight.sum(),
        }
        maxima = {
            "loss/ratio_max": _largest(ratio),
            "loss/mismatch_max_abs": _largest(mismatch.abs()),
        }
    return LossOutput(loss, {k: v.detach() for k, v in sums.items()}, maxima)


def _largest(values: torch.Tensor) -> torch.Tensor:
    """0 for an empty micro-batch: every quantity reported this way is non-negative."""
    return values.max() if values.numel() else values.new_zeros(())

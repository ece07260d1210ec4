"""Policy-gradient losses: PPO, DAPO, GSPO, CISPO and REINFORCE in one, with their KL, entropy and value terms."""

from __future__ import annotations

from functools import partial

import torch

from megatron_pbsd.config import PolicyLossConfig
from megatron_pbsd.kl import ESTIMATORS, k3
from megatron_pbsd.losses import mismatch, value
from megatron_pbsd.losses.inputs import Loss, LossInputs, LossOutput, Output, Reduction


def build_policy_loss(config: PolicyLossConfig, reduction: Reduction) -> Loss:
    """`policy_loss`, with the batch fields and model outputs that it reads as configured."""
    fields: tuple[str, ...] = ("advantages", "old_log_probs", "rollout_log_probs")
    outputs: tuple[Output, ...] = ()
    if config.kl_reference == "reference":
        fields += ("reference_log_probs",)
    if config.value is not None:
        fields, outputs = fields + value.FIELDS, value.OUTPUTS
    return Loss("policy", fields, partial(policy_loss, config=config), reduction, outputs,
                partial(summary, config=config))


def policy_loss(inputs: LossInputs, config: PolicyLossConfig) -> LossOutput:
    """Per token

        - w J + kl_coefficient KL - entropy_coefficient H + value.coefficient L_V

    w from `losses.mismatch`, KL from `megatron_pbsd.kl`, L_V from `losses.value`; J and r as configured:

        clip            min(r A, clip(r) A)      PPO, arXiv 1707.06347, eq. 7; clip(r) is r within [1 - clip_low,
                        1 + clip_high], decoupled by DAPO, arXiv 2503.14476, eq. 8. With `dual_clip` c and A < 0 at
                        least c A (arXiv 1912.09729, eq. 5)
        cispo           sg(clip(r)) A log pi     MiniMax-M1, arXiv 2506.13585, eq. 4 and 5: every token keeps a gradient
        reinforce       A log pi                 Williams 1992

        token           r_t = pi(y_t) / pi_old(y_t)
        sequence        s = exp(mean_t log r_t) for all tokens of the sequence (GSPO, arXiv 2507.18071, eq. 5 and 7)
        sequence_token  sg(s) pi(y_t) / sg(pi(y_t)) (GSPO-token, eq. 13 and 14): the value of s, the gradient of y_t

    The reduction is the configured one: DAPO's mean over tokens, GRPO's and GSPO's over sequences, Dr.GRPO's constant.
    """
    ratio = policy_ratio(inputs, config.ratio)
    objective, clipped = surrogate(inputs, ratio, config)
    correction = mismatch.correct(inputs, config.mismatch)
    per_token = -correction.weights * objective
    if config.kl_coefficient:
        reference = inputs[f"{config.kl_reference}_log_probs"]
        per_token = per_token + config.kl_coefficient * ESTIMATORS[config.kl_estimator](inputs.log_probs - reference)
    if config.entropy_coefficient:
        per_token = per_token - config.entropy_coefficient * inputs.entropy
    sums: dict[str, torch.Tensor] = {}
    if config.value is not None:
        value_loss, sums = value.value_loss(inputs, config.value)
        per_token = per_token + config.value.coefficient * value_loss
    loss = (per_token * inputs.weights).sum()
    sums = {"loss/total": loss.detach(), "loss/clip_fraction": clipped.sum()} | correction.sums() | sums
    return LossOutput(loss, sums | distances(inputs, config), maxima(inputs, ratio))


def policy_ratio(inputs: LossInputs, level: str) -> torch.Tensor:
    """[N], with gradient: r of `policy_loss` for `level` token, sequence or sequence_token."""
    log_ratio = inputs.log_probs - inputs["old_log_probs"]
    if level == "token":
        return log_ratio.exp()
    whole = inputs.sequence_mean(log_ratio)[inputs.sequence]
    if level == "sequence_token":
        whole = whole.detach() + (inputs.log_probs - inputs.log_probs.detach())
    return whole.exp()


def surrogate(inputs: LossInputs, ratio: torch.Tensor, config: PolicyLossConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """J of `policy_loss` with gradient [N], and bool [N]: where a clip decides."""
    advantages = inputs["advantages"]
    bounded = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    if config.objective == "reinforce":
        return advantages * inputs.log_probs, torch.zeros_like(ratio, dtype=torch.bool)
    if config.objective == "cispo":
        return bounded.detach() * advantages * inputs.log_probs, bounded != ratio
    objective = torch.minimum(ratio * advantages, bounded * advantages)
    clipped = objective < ratio * advantages
    if config.dual_clip is not None:
        floor = config.dual_clip * advantages
        too_low = (advantages < 0) & (objective < floor)
        objective, clipped = torch.where(too_low, floor, objective), clipped | too_low
    return objective, clipped


@torch.no_grad()
def distances(inputs: LossInputs, config: PolicyLossConfig) -> dict[str, torch.Tensor]:
    """How far the policy is from others, as sums of k3, and how random it is. The ratio is that of tokens always."""
    log_ratio = inputs.log_probs - inputs["old_log_probs"]
    sums = {
        "loss/ratio_mean": log_ratio.exp().sum(),
        "loss/entropy": inputs.entropy.sum(),
        "loss/kl_old": k3(log_ratio).sum(),
        "loss/kl_rollout": k3(inputs["rollout_log_probs"] - inputs["old_log_probs"]).sum(),
    }
    if config.kl_reference == "reference":
        sums["loss/kl_reference"] = k3(inputs.log_probs - inputs["reference_log_probs"]).sum()
    return sums


@torch.no_grad()
def maxima(inputs: LossInputs, ratio: torch.Tensor) -> dict[str, torch.Tensor]:
    """0 for an empty micro-batch: every quantity reported this way is non-negative."""
    difference = (inputs["old_log_probs"] - inputs["rollout_log_probs"]).abs()
    return {name: values.max() if values.numel() else values.new_zeros(()) for name, values in {
        "loss/ratio_max": ratio.detach(), "loss/mismatch_max_abs": difference}.items()}


def summary(metrics: dict[str, float], config: PolicyLossConfig) -> dict[str, float]:
    """The metrics that are no means of tokens."""
    metrics = mismatch.with_sample_size(metrics)
    return metrics if config.value is None else value.with_explained_variance(metrics)

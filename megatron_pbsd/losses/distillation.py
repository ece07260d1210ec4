"""Distillation from a teacher that scored the student's tokens: on the tokens themselves, or on distributions."""

from __future__ import annotations

import math

import torch

from megatron_pbsd.config import JSDLossConfig
from megatron_pbsd.losses.inputs import LossInputs, LossOutput

SMALLEST_TAIL = 1e-7
"""Probability below which a tail cannot be told from rounding: float32 has 1 - 6e-8 next to 1."""


def reverse_kl_loss(inputs: LossInputs) -> LossOutput:
    """KL(student || teacher) on sampled tokens, as a policy gradient per token (on-policy distillation; Agarwal et al.,
    arXiv 2306.13649; K. Lu et al., 'On-policy distillation', 2025):

        r sg(log pi - log pi_teacher),      r = pi / pi_old

    Differentiating `log pi - log pi_teacher` itself would be noise (`megatron_pbsd.kl`, k1). This has its value, and on
    tokens of pi_old = pi the gradient of KL(pi || pi_teacher) at each position. What a token does to later positions is
    not in it. Neither clipped nor corrected for the rollout engine: an algorithm that puts the same difference into its
    advantages gets both from the policy loss.
    """
    gap = (inputs.log_probs - inputs["teacher_log_probs"]).detach()
    ratio = (inputs.log_probs - inputs["old_log_probs"]).exp()
    loss = (inputs.weights * ratio * gap).sum()
    return LossOutput(loss, {
        "loss/total": loss.detach(), "loss/kl_teacher": gap.sum(), "loss/entropy": inputs.entropy.detach().sum()})


def jsd_loss(inputs: LossInputs, config: JSDLossConfig) -> LossOutput:
    """Generalised Jensen-Shannon divergence of teacher P and student Q per token (GKD, arXiv 2306.13649, section 2):

        beta KL(P || M) + (1 - beta) KL(Q || M),      M = beta P + (1 - beta) Q

    and its limits, each over what vanishes: KL(P || Q) for beta = 0, KL(Q || P) for beta = 1. P and Q are over the
    teacher's K likeliest tokens and one more for the rest of the vocabulary.
    """
    teacher = with_tail(inputs["teacher_top_log_probs"])
    student = with_tail(inputs.candidate_log_probs)
    per_token = generalised_jsd(teacher, student, config.beta)
    loss = (inputs.weights * per_token).sum()
    return LossOutput(loss, {
        "loss/total": loss.detach(), "loss/jsd": per_token.detach().sum(),
        "loss/teacher_tail": teacher[:, -1].exp().sum(), "loss/student_tail": student[:, -1].detach().exp().sum(),
        "loss/entropy": inputs.entropy.detach().sum()})


def with_tail(log_probs: torch.Tensor) -> torch.Tensor:
    """[N, K] → [N, K + 1]: the last is log(1 - sum of the others), not below log SMALLEST_TAIL."""
    inside = log_probs.logsumexp(-1, keepdim=True).clamp(max=-SMALLEST_TAIL)
    return torch.cat([log_probs, _log1mexp(inside)], -1)


def generalised_jsd(teacher: torch.Tensor, student: torch.Tensor, beta: float) -> torch.Tensor:
    """[…] from log-probabilities […, V] that sum to 1; differentiable, for any beta in [0, 1]."""
    if beta == 0:
        return _kl(teacher, student)
    if beta == 1:
        return _kl(student, teacher)
    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    return beta * _kl(teacher, mixture) + (1 - beta) * _kl(student, mixture)


def _kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return (p.exp() * (p - q)).sum(-1)


def _log1mexp(x: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(x)) for x < 0, accurate at both ends (M. Mächler, 'Accurately computing log(1 - exp(-|a|))')."""
    return torch.where(x > -math.log(2), (-x.expm1()).log(), (-x.exp()).log1p())

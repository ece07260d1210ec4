"""Distillation losses against plain probabilities."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from loss_inputs import gradients, make_inputs

from megatron_pbsd import losses
from megatron_pbsd.config import JSDLossConfig, ReverseKLLossConfig, SFTLossConfig
from megatron_pbsd.losses.distillation import generalised_jsd, with_tail

BETAS = [0, 0.1, 0.5, 0.9, 1]


def divergence(p: torch.Tensor, q: torch.Tensor, beta: float) -> torch.Tensor:
    """arXiv 2306.13649, on probabilities: beta KL(p || m) + (1 - beta) KL(q || m)."""
    total = torch.zeros((), dtype=p.dtype)
    for a, b in zip(p, q, strict=True):
        if beta in (0, 1):
            total = total + (a * torch.log(a / b) if beta == 0 else b * torch.log(b / a))
        else:
            m = beta * a + (1 - beta) * b
            total = total + beta * a * torch.log(a / m) + (1 - beta) * b * torch.log(b / m)
    return total


def test_sft_is_the_weighted_negative_log_likelihood():
    x = make_inputs()
    output = losses.build(SFTLossConfig()).function(x)
    expected = sum(-w * p for w, p in zip(x.weights, x.log_probs, strict=True))
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(gradients(output.loss, x)[0], -x.weights)


@pytest.mark.parametrize("beta", BETAS)
def test_jsd_on_top_tokens_and_tail_equals_plain_probabilities(beta):
    """The student's gradient is checked down to its logits over the whole vocabulary."""
    n, vocabulary, k = 5, 9, 3
    random = torch.Generator().manual_seed(1)
    logits = torch.randn(n, vocabulary, generator=random, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(n, vocabulary, generator=random, dtype=torch.float64).log_softmax(-1)
    top_log_probs, top_tokens = teacher.topk(k, -1)
    x = make_inputs(lengths=(n,))
    student = logits.log_softmax(-1)
    x = replace(x, candidate_log_probs=student.gather(-1, top_tokens),
                fields={"teacher_top_tokens": top_tokens, "teacher_top_log_probs": top_log_probs})
    output = losses.build(JSDLossConfig(beta=beta)).function(x)

    expected = torch.zeros((), dtype=torch.float64)
    for t in range(n):
        p, q = teacher[t].exp(), student[t].exp()
        rest = torch.tensor([i not in top_tokens[t] for i in range(vocabulary)])
        buckets = [torch.cat([side[top_tokens[t]], side[rest].sum()[None]]) for side in (p, q)]
        expected = expected + x.weights[t] * divergence(*buckets, beta)
    torch.testing.assert_close(output.loss, expected)
    found = torch.autograd.grad(output.loss, logits, retain_graph=True)[0]
    torch.testing.assert_close(found, torch.autograd.grad(expected, logits)[0])
    tail = sum(float(1 - teacher[t].exp()[top_tokens[t]].sum()) for t in range(n))
    assert float(output.sums["loss/teacher_tail"]) == pytest.approx(tail)


def test_jsd_approaches_its_limits():
    random = torch.Generator().manual_seed(0)
    teacher, student = torch.randn(2, 4, 6, generator=random, dtype=torch.float64).log_softmax(-1)
    small = 1e-6
    torch.testing.assert_close(generalised_jsd(teacher, student, small) / small, generalised_jsd(teacher, student, 0),
                               rtol=1e-4, atol=0)
    torch.testing.assert_close(generalised_jsd(teacher, student, 1 - small) / small,
                               generalised_jsd(teacher, student, 1), rtol=1e-4, atol=0)
    for beta in BETAS:
        assert float(generalised_jsd(teacher, teacher, beta).abs().max()) < 1e-12
        torch.testing.assert_close(generalised_jsd(teacher, student, beta), generalised_jsd(student, teacher, 1 - beta))


@pytest.mark.parametrize("inside", [1 - 1e-3, 1 - 1e-9, 1.0, 1 + 1e-6, 1e-12, 0.5])
def test_the_tail_is_accurate_and_never_infinite(inside):
    log_probs = (torch.tensor([[0.75, 0.25]], dtype=torch.float64) * inside).log().float().requires_grad_()
    tail = with_tail(log_probs)[0, -1]
    assert float(tail.detach()) == pytest.approx(math.log(max(1 - inside, 1e-7)), rel=1e-3, abs=1e-7)
    assert torch.isfinite(torch.autograd.grad(tail, log_probs)[0]).all()


@pytest.mark.parametrize("beta", BETAS)
def test_jsd_when_the_teacher_is_certain_and_the_student_is_not(beta):
    certain = torch.log_softmax(torch.tensor([[60.0, 0.0, -60.0]]), -1)
    unsure = torch.log_softmax(torch.zeros(1, 3), -1)
    x = make_inputs(lengths=(1,), dtype=torch.float32)
    for teacher, student in ((certain, unsure), (unsure, certain), (certain, certain)):
        leaf = student.clone().requires_grad_()
        output = losses.build(JSDLossConfig(beta=beta)).function(replace(
            x, candidate_log_probs=leaf, fields={"teacher_top_tokens": torch.arange(3)[None],
                                                 "teacher_top_log_probs": teacher}))
        assert torch.isfinite(output.loss) and float(output.loss.detach()) >= -1e-6
        assert torch.isfinite(torch.autograd.grad(output.loss, leaf)[0]).all()


def test_reverse_kl_and_its_gradient():
    """Token by token; and on policy, over all tokens that might be drawn, the gradient of KL(student || teacher)."""
    x = make_inputs()
    output = losses.build(ReverseKLLossConfig()).function(x)
    expected = torch.zeros((), dtype=torch.float64)
    for t in range(len(x.log_probs)):
        gap = float((x.log_probs[t] - x["teacher_log_probs"][t]).detach())
        expected = expected + x.weights[t] * torch.exp(x.log_probs[t] - x["old_log_probs"][t]) * gap
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(gradients(output.loss, x)[0], gradients(expected, x)[0])

    random = torch.Generator().manual_seed(0)
    logits = torch.randn(6, generator=random, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(6, generator=random, dtype=torch.float64).log_softmax(-1)
    log_probs = logits.log_softmax(-1)
    x = replace(make_inputs(lengths=(6,)), log_probs=log_probs, weights=log_probs.exp().detach(),
                fields={"teacher_log_probs": teacher})
    output = losses.build(ReverseKLLossConfig(), on_policy=True).function(x)
    kl = (log_probs.exp() * (log_probs - teacher)).sum()
    torch.testing.assert_close(output.loss, kl)
    torch.testing.assert_close(torch.autograd.grad(output.loss, logits, retain_graph=True)[0],
                               torch.autograd.grad(kl, logits)[0])

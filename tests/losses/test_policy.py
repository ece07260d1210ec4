"""Losses against the same formulas written token by token in plain torch."""

from __future__ import annotations

import math
import pickle
from dataclasses import replace

import pytest
import torch

from megatron_pbsd import losses
from megatron_pbsd.config import PolicyLossConfig, SFTConfig
from megatron_pbsd.losses import LossInputs

N = 50


def inputs(seed: int = 0) -> LossInputs:
    torch.manual_seed(seed)
    old = -3 + 0.5 * torch.randn(N)
    return LossInputs(
        log_probs=(old + 0.3 * torch.randn(N)).requires_grad_(), entropy=torch.rand(N).requires_grad_(),
        weights=torch.rand(N), sequence=torch.zeros(N, dtype=torch.int64), sequences=1,
        fields={"advantages": torch.randn(N), "old_log_probs": old,
                "rollout_log_probs": old + 0.3 * torch.randn(N)})


def reference(x: LossInputs, c: PolicyLossConfig) -> tuple[torch.Tensor, dict[str, float]]:
    total, clipped, highest = torch.zeros(()), 0, 0.0
    for t in range(N):
        ratio = torch.exp(x.log_probs[t] - x["old_log_probs"][t])
        low, high = 1 - c.clip_low, 1 + c.clip_high
        advantage = x["advantages"][t]
        if advantage > 0 and ratio > high:
            surrogate, was_clipped = high * advantage, True
        elif advantage < 0 and ratio < low:
            surrogate, was_clipped = low * advantage, True
        else:
            surrogate, was_clipped = ratio * advantage, False
        weight = min(math.exp(x["old_log_probs"][t] - x["rollout_log_probs"][t]), c.mismatch_cap)
        kl = 1 / ratio - 1 + torch.log(ratio)
        loss = -weight * surrogate + c.kl_coefficient * kl - c.entropy_coefficient * x.entropy[t]
        total = total + x.weights[t] * loss
        clipped += was_clipped
        highest = max(highest, float(ratio.detach()))
    return total, {"loss/clip_fraction": clipped, "loss/ratio_max": highest}


@pytest.mark.parametrize("config", [
    PolicyLossConfig(),
    PolicyLossConfig(clip_low=0.1, clip_high=0.05, kl_coefficient=0.4, entropy_coefficient=0.1, mismatch_cap=1.1),
])
def test_policy_loss_and_gradient(config):
    x, y = inputs(), inputs()
    output = losses.build(config).function(x)
    expected, metrics = reference(y, config)
    torch.testing.assert_close(output.loss, expected)
    output.loss.backward()
    expected.backward()
    torch.testing.assert_close(x.log_probs.grad, y.log_probs.grad)
    if config.entropy_coefficient:
        torch.testing.assert_close(x.entropy.grad, y.entropy.grad)
    assert float(output.sums["loss/clip_fraction"]) == metrics["loss/clip_fraction"] > 0
    assert float(output.maxima["loss/ratio_max"]) == pytest.approx(metrics["loss/ratio_max"])


def test_on_policy_ratio_is_one_and_kl_is_zero():
    x = inputs()
    old = x["old_log_probs"]
    same = replace(x, log_probs=old.clone(), fields={**x.fields, "rollout_log_probs": old})
    output = losses.build(PolicyLossConfig()).function(same)
    assert float(output.sums["loss/ratio_mean"]) == N
    assert float(output.maxima["loss/ratio_max"]) == 1
    for name in ("loss/kl_old", "loss/kl_rollout", "loss/clip_fraction"):
        assert float(output.sums[name]) == 0
    assert float(output.loss.detach()) == pytest.approx(-float((x["advantages"] * x.weights).sum()), rel=1e-5)


def test_empty_micro_batch_adds_nothing():
    empty = torch.zeros(0)
    leaf = torch.zeros(0, requires_grad=True)
    for config in (PolicyLossConfig(), SFTConfig()):
        output = losses.build(config).function(LossInputs(
            leaf, empty, empty, empty.long(), 0, dict.fromkeys(losses.policy.FIELDS, empty)))
        assert float(output.loss.detach()) == 0
        assert all(float(v) == 0 for v in (output.sums | output.maxima).values())


def test_a_loss_can_be_sent_to_another_process():
    loss = pickle.loads(pickle.dumps(losses.build(PolicyLossConfig(clip_low=0.3))))
    x = inputs()
    torch.testing.assert_close(loss.function(x).loss, losses.build(PolicyLossConfig(clip_low=0.3)).function(x).loss)

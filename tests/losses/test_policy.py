"""Policy losses against their formulas written sequence by sequence and token by token."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from loss_inputs import POLICIES, gradients, make_inputs

from megatron_pbsd import losses
from megatron_pbsd.config import NoMismatchConfig, PolicyLossConfig, TokenTISConfig
from megatron_pbsd.losses import LossInputs


def mismatch_weight(x: LossInputs, tokens: list[int], t: int, c) -> tuple[float, bool, bool]:
    """weight, capped, masked"""
    ratios = {u: math.exp(x["old_log_probs"][u] - x["rollout_log_probs"][u]) for u in tokens}
    product = math.prod(ratios.values())
    if c.name == "none":
        return 1.0, False, False
    if c.name in ("token_tis", "sequence_tis"):
        ratio = ratios[t] if c.name == "token_tis" else product
        return min(ratio, c.cap), ratio > c.cap, False
    ratio = {"icepop": ratios[t], "sequence_mis": product, "geometric_rejection": product ** (1 / len(tokens))}[c.name]
    if not c.low <= ratio <= c.high:
        return 0.0, False, True
    return (1.0 if c.name == "geometric_rejection" else ratio), False, False


def reference(x: LossInputs, c: PolicyLossConfig) -> tuple[torch.Tensor, dict[str, float]]:
    total = torch.zeros((), dtype=torch.float64)
    counts = dict.fromkeys(("clip_fraction", "mismatch_weight", "mismatch_clipped", "mismatch_masked"), 0.0)
    low, high = 1 - c.clip_low, 1 + c.clip_high
    for s in range(x.sequences):
        tokens = [t for t in range(len(x.sequence)) if x.sequence[t] == s]
        geometric = math.prod([torch.exp(x.log_probs[t] - x["old_log_probs"][t]) for t in tokens]) ** (1 / len(tokens))
        for t in tokens:
            ratio = {
                "token": torch.exp(x.log_probs[t] - x["old_log_probs"][t]),
                "sequence": geometric,
                "sequence_token": geometric.detach() * torch.exp(x.log_probs[t]) / torch.exp(x.log_probs[t]).detach(),
            }[c.ratio]
            advantage = x["advantages"][t]
            if c.objective == "reinforce":
                objective, clipped = advantage * x.log_probs[t], False
            elif c.objective == "cispo":
                bounded = min(max(float(ratio.detach()), low), high)
                objective, clipped = bounded * advantage * x.log_probs[t], bounded != float(ratio.detach())
            elif advantage > 0 and ratio > high:
                objective, clipped = high * advantage, True
            elif advantage < 0 and ratio < low:
                objective, clipped = low * advantage, True
            elif advantage < 0 and c.dual_clip is not None and ratio > c.dual_clip:
                objective, clipped = c.dual_clip * advantage, True
            else:
                objective, clipped = ratio * advantage, False
            weight, capped, masked = mismatch_weight(x, tokens, t, c.mismatch)
            log_kl = x.log_probs[t] - x[f"{c.kl_reference}_log_probs"][t]
            kl = {"k1": log_kl, "k2": log_kl * log_kl / 2, "k3": 1 / torch.exp(log_kl) - 1 + log_kl}[c.kl_estimator]
            loss = -weight * objective + c.kl_coefficient * kl - c.entropy_coefficient * x.entropy[t]
            if c.value is not None:
                error = (x.values[t] - x["returns"][t]) ** 2
                if c.value.clip is not None:
                    old = x["values"][t]
                    moved = old + torch.clip(x.values[t] - old, -c.value.clip, c.value.clip)
                    error = max(error, (moved - x["returns"][t]) ** 2)
                loss = loss + c.value.coefficient * error / 2
            total = total + x.weights[t] * loss
            for name, value in zip(counts, (clipped, weight, capped, masked), strict=True):
                counts[name] += float(value)
    return total, counts


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("seed", [0, 1])
def test_loss_gradient_and_metrics(name, seed):
    x, config = make_inputs(seed), POLICIES[name]
    output = losses.build(config).function(x)
    expected, counts = reference(x, config)
    torch.testing.assert_close(output.loss, expected)
    for found, wanted in zip(gradients(output.loss, x), gradients(expected, x), strict=True):
        torch.testing.assert_close(found, wanted)
    for metric, wanted in counts.items():
        assert float(output.sums[f"loss/{metric}"]) == pytest.approx(wanted), metric


def test_every_branch_of_the_references_is_taken():
    """The cases above mean something: in each, some tokens are clipped, capped or masked and some are not."""
    seen = {}
    for name, config in POLICIES.items():
        for seed in (0, 1):
            x = make_inputs(seed)
            for metric, value in losses.build(config).function(x).sums.items():
                seen.setdefault((name, metric), set()).add(0 < float(value) < len(x.log_probs))
    for name in ("defaults", "dapo", "dual_clip", "gspo", "gspo_wide", "gspo_token", "cispo"):
        assert True in seen[name, "loss/clip_fraction"], name
    for name in ("dapo", "gspo"):
        assert True in seen[name, "loss/mismatch_clipped"], name
    for name in ("gspo_token", "cispo", "reinforce"):
        assert True in seen[name, "loss/mismatch_masked"], name
    assert True in seen["ppo", "loss/value_clip_fraction"]


def test_gradient_of_gspo():
    """arXiv 2507.18071, eq. 10: 1/G sum_i s_i A_i 1/|y_i| sum_t grad log pi(y_t), where nothing is clipped."""
    x = make_inputs()
    lengths = torch.bincount(x.sequence)
    x = replace(x, weights=1 / (x.sequences * lengths[x.sequence].double()),
                fields={**x.fields, "rollout_log_probs": x["old_log_probs"]})
    expected = torch.zeros_like(x.log_probs)
    for s in range(x.sequences):
        mine = x.sequence == s
        ratio = torch.exp((x.log_probs - x["old_log_probs"])[mine].mean())
        expected[mine] = -ratio.detach() * x["advantages"][mine] / (x.sequences * lengths[s])
    for ratio in ("sequence", "sequence_token"):
        config = PolicyLossConfig(ratio=ratio, clip_low=1, clip_high=9)
        found, *_ = gradients(losses.build(config).function(x).loss, x)
        torch.testing.assert_close(found, expected, msg=ratio)


def test_gspo_forgets_credit_within_a_sequence_and_gspo_token_keeps_it():
    x = make_inputs(lengths=(4,))
    advantages = torch.tensor([1.0, -1.0, 2.0, -2.0], dtype=torch.float64)
    x = replace(x, weights=torch.ones_like(x.weights), fields={**x.fields, "advantages": advantages})
    grads = {}
    for ratio in ("sequence", "sequence_token"):
        config = PolicyLossConfig(ratio=ratio, clip_low=1, clip_high=9, mismatch=NoMismatchConfig())
        grads[ratio], *_ = gradients(losses.build(config).function(x).loss, x)
    assert float(grads["sequence"].abs().max()) < 1e-12
    assert torch.equal(grads["sequence_token"].sign(), -advantages.sign())


def test_cispo_never_loses_a_token_and_clip_does():
    x = make_inputs()
    lost = {}
    for objective in ("clip", "cispo"):
        output = losses.build(PolicyLossConfig(objective=objective)).function(x)
        lost[objective] = int((gradients(output.loss, x)[0] == 0).sum())
    assert lost["cispo"] == 0 < lost["clip"]


@pytest.mark.parametrize("objective", ["clip", "cispo", "reinforce"])
@pytest.mark.parametrize("ratio", ["token", "sequence", "sequence_token"])
def test_on_policy_every_objective_follows_the_policy_gradient(objective, ratio):
    """Ratio 1: the gradient is - A grad log pi, spread over the sequence where the ratio is the sequence's."""
    x = make_inputs()
    lengths = torch.bincount(x.sequence)[x.sequence]
    x = replace(x, weights=1 / lengths, fields={**x.fields, "rollout_log_probs": x.log_probs.detach()})
    output = losses.build(PolicyLossConfig(objective=objective, ratio=ratio), on_policy=True).function(x)
    torch.testing.assert_close(gradients(output.loss, x)[0], -x["advantages"] / lengths)
    n = len(x.log_probs)
    assert float(output.sums["loss/ratio_mean"]) == n
    assert float(output.maxima["loss/ratio_max"]) == 1
    for name in ("kl_old", "kl_rollout", "clip_fraction", "mismatch_clipped", "mismatch_masked"):
        assert float(output.sums[f"loss/{name}"]) == 0
    assert float(output.sums["loss/mismatch_weight"]) == n


def test_effective_sample_size_and_explained_variance():
    x = make_inputs()
    loss = losses.build(POLICIES["value_unclipped"].model_copy(update={"mismatch": TokenTISConfig(cap=1.05)}))
    n = len(x.log_probs)
    metrics = loss.summary({name: float(value) / n for name, value in loss.function(x).sums.items()})
    weight = (x["old_log_probs"] - x["rollout_log_probs"]).exp().clamp(max=1.05)
    assert metrics["loss/mismatch_sample_size"] == pytest.approx(float(weight.sum() ** 2 / (weight**2).sum() / n))
    assert 0 < metrics["loss/mismatch_sample_size"] < 1
    error = ((x.values - x["returns"]) ** 2).mean().detach()
    assert metrics["loss/value_explained_variance"] == pytest.approx(
        float(1 - error / x["returns"].var(unbiased=False)))
    assert not any("squared" in name for name in metrics)


def test_sequence_weights_survive_ratios_that_overflow():
    x = make_inputs(lengths=(300, 5), dtype=torch.float32)
    x = replace(x, fields={**x.fields, "rollout_log_probs": x["old_log_probs"] - 1})
    for name in ("gspo", "gspo_token"):
        output = losses.build(POLICIES[name]).function(x)
        assert torch.isfinite(output.loss) and torch.isfinite(gradients(output.loss, x)[0]).all()

"""Stale tokens that are masked: every loss gives fresh tokens exactly the terms and gradients they have among all."""

from dataclasses import replace

import pytest
import torch
from loss_inputs import LOSSES, gradients, leaves, make_inputs, over_context

from megatron_pbsd import losses
from megatron_pbsd.config import PolicyLossConfig
from megatron_pbsd.losses.stale import SHARE


def world(seed, share=0.5):
    """Inputs, and bool [N]: the beginnings of sequences, which older weights generated."""
    inputs = make_inputs(seed)
    random = torch.Generator().manual_seed(seed)
    stale = torch.rand(len(inputs.sequence), generator=random) < share
    return replace(inputs, fields={**inputs.fields, "stale": stale.double()}), stale


def frozen(inputs, stale):
    """`inputs` written out by hand: numbers in place of variables wherever a token is stale, and weights of 0."""
    fixed = [torch.stack([row.detach() if old else row for row, old in zip(leaf, stale, strict=True)])
             for leaf in leaves(inputs)]
    weights = inputs.weights * torch.tensor([0.0 if old else 1.0 for old in stale])
    return replace(inputs, weights=weights, **dict(zip(
        ("log_probs", "entropy", "values", "candidate_log_probs"), fixed, strict=True)))


@pytest.mark.parametrize("name", LOSSES)
def test_a_stale_token_is_a_constant_of_weight_zero(name):
    inputs, stale = world(3)
    plain, masked = (losses.build(LOSSES[name], generation_limit=20, mask_stale=mask) for mask in (False, True))
    assert masked.fields == (*plain.fields, "stale") and masked.reduction == plain.reduction
    expected = plain.function(frozen(inputs, stale))
    output = masked.function(inputs)
    torch.testing.assert_close(output.loss, expected.loss)
    assert output.sums[SHARE] == stale.sum()
    found = gradients(output.loss, inputs)
    for gradient, wanted in zip(found, gradients(expected.loss, inputs), strict=True):
        torch.testing.assert_close(gradient, wanted)
        assert not gradient[stale].any()
    assert any(gradient[~stale].any() for gradient in found)


@pytest.mark.parametrize("name", [name for name, section in LOSSES.items() if name not in ("gspo", "gspo_wide")])
def test_fresh_tokens_count_as_much_as_if_all_were_trained(name):
    """Whatever is not a ratio of whole sequences, whose gradient is of all their tokens."""
    inputs, stale = world(4)
    plain, masked = (losses.build(LOSSES[name], generation_limit=20, mask_stale=mask) for mask in (False, True))
    whole, fresh = (gradients(loss.function(inputs).loss, inputs) for loss in (plain, masked))
    for all_tokens, some in zip(whole, fresh, strict=True):
        torch.testing.assert_close(some[~stale], all_tokens[~stale])
        assert not some[stale].any()


@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("name", ["defaults", "gspo", "pbsd", "jsd", "custom"])
def test_all_or_nothing_is_stale(name, share):
    inputs, _ = world(5, share)
    plain, masked = (losses.build(LOSSES[name], generation_limit=20, mask_stale=mask) for mask in (False, True))
    found = gradients(masked.function(inputs).loss, inputs)
    wanted = gradients(plain.function(inputs).loss * (1 - share), inputs)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_context_parallel_ranks_agree():
    inputs, stale = world(6)
    loss = losses.build(LOSSES["gspo"], mask_stale=True)
    whole = loss.function(inputs)
    owner = torch.arange(len(stale)) % 2
    parts = over_context(loss.function, inputs, owner, 2)
    total = sum(part.loss for part in parts)
    torch.testing.assert_close(total, whole.loss)
    for one, other in zip(gradients(total, inputs), gradients(whole.loss, inputs), strict=True):
        torch.testing.assert_close(one, other)


def test_staleness_is_corrected_by_the_ratio_of_the_weights_that_sampled():
    """Decoupled: clipped around the weights that are trained, weighed by these over those that sampled each token."""
    inputs, _ = world(7)
    config = PolicyLossConfig(clip_low=0.1, clip_high=0.15)
    found = losses.build(config).function(inputs).loss
    total = 0.0
    for t in range(len(inputs.weights)):
        proximal, behaviour = inputs["old_log_probs"][t], inputs["rollout_log_probs"][t]
        ratio, advantage = (inputs.log_probs[t] - proximal).exp(), inputs["advantages"][t]
        surrogate = torch.min(ratio * advantage, ratio.clamp(0.9, 1.15) * advantage)
        total = total - inputs.weights[t] * min((proximal - behaviour).exp(), 2.0) * surrogate
    torch.testing.assert_close(found, total)

"""What every loss must do: not depend on how tokens are divided over ranks and micro-batches."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
import torch
from loss_inputs import LOSSES, gradients, leaves, make_inputs, of_sequences, of_tokens, over_context

from megatron_pbsd import losses

every_loss = pytest.mark.parametrize("name", LOSSES)
on_policy_or_not = pytest.mark.parametrize("on_policy", [False, True], ids=["off_policy", "on_policy"])


def build(name: str, on_policy: bool = False) -> losses.Loss:
    return losses.build(LOSSES[name], on_policy)


def declared(loss: losses.Loss, inputs: losses.LossInputs) -> losses.LossInputs:
    """With the declared fields and outputs alone, as a learner gives them."""
    return replace(
        inputs, fields={name: inputs[name] for name in loss.fields},
        values=inputs.values if "values" in loss.outputs else torch.zeros_like(inputs.values) * torch.nan,
        candidate_log_probs=inputs.candidate_log_probs if "candidates" in loss.outputs
        else torch.zeros_like(inputs.candidate_log_probs) * torch.nan)


def assert_same(parts: list[losses.LossOutput], inputs: losses.LossInputs, whole: losses.LossOutput) -> None:
    torch.testing.assert_close(sum(part.loss for part in parts), whole.loss)
    for found, wanted in zip(gradients(sum(part.loss for part in parts), inputs), gradients(whole.loss, inputs),
                             strict=True):
        torch.testing.assert_close(found, wanted)
    for part in parts:
        assert set(part.sums) == set(whole.sums) and set(part.maxima) == set(whole.maxima)
    for name, wanted in whole.sums.items():
        torch.testing.assert_close(sum(part.sums[name].float() for part in parts), wanted.float(), msg=name)
    for name, wanted in whole.maxima.items():
        torch.testing.assert_close(max(part.maxima[name] for part in parts), wanted, msg=name)


@every_loss
@on_policy_or_not
@pytest.mark.parametrize("ranks", [2, 3])
def test_tokens_of_a_sequence_divided_over_context_parallel_ranks(name, on_policy, ranks):
    inputs, loss = make_inputs(), build(name, on_policy)
    owner = torch.randint(0, ranks, inputs.sequence.shape, generator=torch.Generator().manual_seed(ranks))
    given = declared(loss, inputs)
    assert_same(over_context(loss.function, given, owner, ranks), inputs, loss.function(given))


@every_loss
def test_a_context_parallel_rank_without_tokens(name):
    inputs, loss = make_inputs(), build(name)
    given = declared(loss, inputs)
    owner = torch.zeros_like(inputs.sequence)
    assert_same(over_context(loss.function, given, owner, 2), inputs, loss.function(given))


@every_loss
@on_policy_or_not
def test_sequences_divided_over_micro_batches(name, on_policy):
    inputs, loss = make_inputs(), build(name, on_policy)
    given = declared(loss, inputs)
    parts = [loss.function(of_sequences(given, chosen)) for chosen in ([2, 0], [], [3], [1])]
    assert_same(parts, inputs, loss.function(given))


@every_loss
@on_policy_or_not
@pytest.mark.parametrize("sequences", [0, 3])
def test_an_empty_micro_batch_adds_nothing(name, on_policy, sequences):
    loss = build(name, on_policy)
    inputs = make_inputs()
    empty = replace(of_tokens(inputs, torch.zeros_like(inputs.sequence, dtype=torch.bool)), sequences=sequences)
    output = loss.function(empty)
    assert float(output.loss.detach()) == 0
    assert all(float(value) == 0 for value in (output.sums | output.maxima).values())
    assert all(not grad.any() for grad in gradients(output.loss, inputs))
    if not loss.outputs:
        means = {name: 0.0 for name in output.sums | output.maxima}
        assert all(value == 0 for value in loss.summary(means).values())


@every_loss
@on_policy_or_not
def test_a_loss_can_be_sent_to_another_process(name, on_policy):
    loss = build(name, on_policy)
    copy = pickle.loads(pickle.dumps(loss))
    inputs = make_inputs()
    torch.testing.assert_close(copy.function(inputs).loss, loss.function(inputs).loss)
    assert (copy.fields, copy.reduction, copy.outputs) == (loss.fields, loss.reduction, loss.outputs)
    metrics = {key: float(value) for key, value in loss.function(inputs).sums.items()}
    assert copy.summary(metrics) == loss.summary(metrics)


@every_loss
def test_on_policy_is_the_same_loss_with_log_probs_as_old_ones(name):
    inputs = make_inputs()
    off = build(name)
    same = replace(inputs, fields={**inputs.fields, "old_log_probs": inputs.log_probs.detach()})
    on = build(name, on_policy=True)
    assert "old_log_probs" not in on.fields
    without = replace(inputs, fields={key: value for key, value in inputs.fields.items() if key != "old_log_probs"})
    found, wanted = on.function(without), off.function(same)
    torch.testing.assert_close(found.loss, wanted.loss)
    for a, b in zip(gradients(found.loss, inputs), gradients(wanted.loss, inputs), strict=True):
        torch.testing.assert_close(a, b)


@every_loss
def test_only_the_loss_has_a_gradient(name):
    output = build(name).function(make_inputs())
    assert output.loss.requires_grad
    assert not any(value.requires_grad for value in (output.sums | output.maxima).values())


@every_loss
def test_float32_and_its_gradient_are_finite_far_off_policy(name):
    inputs = make_inputs(dtype=torch.float32)
    far = {key: value - 8 * torch.rand(len(value)) if key.endswith("log_probs") and value.ndim == 1 else value
           for key, value in inputs.fields.items()}
    loss = build(name)
    output = loss.function(replace(inputs, fields=far))
    assert output.loss.dtype == torch.float32
    for value in (output.loss, *gradients(output.loss, inputs), *leaves(inputs)):
        assert torch.isfinite(value).all()

"""PBSD inside the loss gives every token the advantage that the algorithm gives it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from loss_inputs import gradients, make_inputs, of_sequences, over_context

from megatron_pbsd import losses
from megatron_pbsd.algorithms import Outcome, build_algorithm
from megatron_pbsd.algorithms.advantages import group_relative
from megatron_pbsd.config import PBSDConfig, PolicyLossConfig
from megatron_pbsd.losses import LossError, LossInputs, LossOutput
from megatron_pbsd.losses.pbsd import redistributed, token_multipliers

CONFIGS = {
    "defaults": PBSDConfig(),
    "no_gate": PBSDConfig(snr_gate=0, epsilon=0.9, temperature=0.7),
    "sums": PBSDConfig(snr_gate=0.5, normalise_length=False, temperature=4),
    "answer": PBSDConfig(snr_gate=0.1, exclude_answer_span=False, normalise_std=False),
}
LENGTHS = (9, 1, 14, 6, 11, 3)
REWARDS = (1.0, 0.0, 0.0, 1.0, 0.3, 0.3)
GROUPS = "aaabcc"


@dataclass(frozen=True)
class World:
    """The same trajectories as the algorithm and as the loss see them. order: [N], tokens by sequence, then turn."""

    inputs: LossInputs
    outcomes: list[Outcome]
    order: np.ndarray


def make_world(seed: int, normalise_std: bool) -> World:
    x = make_inputs(seed, LENGTHS, torch.float32)
    order = np.lexsort((x["turn_index"], x.sequence))
    outcome_advantages = group_relative(REWARDS, list(GROUPS), normalise_std)
    # Turns of an Outcome do not decrease, and its answer is in its last turn.
    last = torch.zeros(len(LENGTHS), dtype=torch.int64).scatter_reduce(0, x.sequence, x["turn_index"], "amax")
    answer = x["answer_mask"] * (x["turn_index"] == last[x.sequence])
    fields = {**x.fields, "answer_mask": answer,
              "advantages": torch.from_numpy(outcome_advantages).float()[x.sequence]}
    x = replace(x, fields=fields)
    outcomes = []
    for i, (reward, group) in enumerate(zip(REWARDS, GROUPS, strict=True)):
        mine = order[x.sequence.numpy()[order] == i]
        outcomes.append(Outcome(group, reward, x["turn_index"].numpy()[mine], answer.numpy()[mine] > 0,
                                x["old_log_probs"].numpy()[mine], x["teacher_log_probs"].numpy()[mine]))
    return World(x, outcomes, order)


def advantages_of_the_algorithm(world: World, config: PBSDConfig) -> torch.Tensor:
    flat = np.empty(len(world.order), np.float32)
    flat[world.order] = np.concatenate(build_algorithm(config).assign(world.outcomes).advantages)
    return torch.from_numpy(flat)


def keep_advantages(inputs: LossInputs) -> LossOutput:
    """A stand-in for the policy loss: its loss is what it was given."""
    return LossOutput((inputs["advantages"] * inputs.log_probs).sum(), {"advantages": inputs["advantages"]})


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_each_token_gets_the_advantage_of_the_algorithm(name, seed, ranks):
    config = CONFIGS[name]
    world = make_world(seed, config.normalise_std)
    expected = advantages_of_the_algorithm(world, config)
    assert float((expected - world.inputs["advantages"]).abs().max()) > 0.01
    hook = redistributed(losses.Loss("kept", (), keep_advantages), config).function
    owner = torch.randint(0, ranks, expected.shape, generator=torch.Generator().manual_seed(seed))
    found = torch.empty_like(expected)
    for rank, output in enumerate(over_context(hook, world.inputs, owner, ranks)):
        found[owner == rank] = output.sums["advantages"]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_ranks_that_hold_different_turns_agree_on_their_number():
    world = make_world(0, True)
    expected = advantages_of_the_algorithm(world, PBSDConfig())
    owner = (world.inputs["turn_index"] > 1).long()
    hook = redistributed(losses.Loss("kept", (), keep_advantages), PBSDConfig()).function
    for rank, output in enumerate(over_context(hook, world.inputs, owner, 2)):
        torch.testing.assert_close(output.sums["advantages"], expected[owner == rank], rtol=0, atol=1e-6)


def test_each_sequence_alone_gets_the_same():
    world = make_world(0, True)
    expected = advantages_of_the_algorithm(world, PBSDConfig())
    for i in range(len(LENGTHS)):
        found, _ = token_multipliers(of_sequences(world.inputs, [i]), PBSDConfig())
        mine = world.inputs.sequence == i
        torch.testing.assert_close(found * world.inputs["advantages"][mine], expected[mine], rtol=0, atol=1e-6)


def test_the_whole_loss_is_the_policy_loss_on_the_algorithms_advantages():
    world, config = make_world(0, True), PBSDConfig(loss=PolicyLossConfig(clip_low=0.1))
    inside = losses.build(config)
    assert set(inside.fields) == {"advantages", "old_log_probs", "rollout_log_probs", "teacher_log_probs", "turn_index",
                                  "answer_mask"}
    outside = losses.build(config.loss)
    credited = replace(world.inputs, fields={
        **world.inputs.fields, "advantages": advantages_of_the_algorithm(world, config)})
    found, wanted = inside.function(world.inputs), outside.function(credited)
    torch.testing.assert_close(found.loss, wanted.loss)
    torch.testing.assert_close(gradients(found.loss, world.inputs)[0], gradients(wanted.loss, credited)[0])


def test_the_gradient_does_not_go_through_the_evidence():
    """On policy the student's log-probs are the ones being trained; the evidence is made of their values."""
    world = make_world(0, True)
    loss = losses.build(PBSDConfig(loss=PolicyLossConfig(objective="reinforce", mismatch={"name": "none"})), True)
    x = replace(world.inputs, weights=torch.ones_like(world.inputs.weights))
    student = {**x.fields, "old_log_probs": x.log_probs.detach()}
    multipliers, _ = token_multipliers(replace(x, fields=student), PBSDConfig())
    torch.testing.assert_close(gradients(loss.function(x).loss, x)[0], -x["advantages"] * multipliers)


def test_metrics_count_tokens():
    world = make_world(0, True)
    n = len(world.order)
    _, sums = token_multipliers(world.inputs, PBSDConfig(snr_gate=0, epsilon=0.01))
    assert 0 < float(sums["loss/pbsd_clip_fraction"]) <= float(sums["loss/pbsd_snr_kept"]) <= n
    assert 0 < float(sums["loss/pbsd_multiplier_deviation"]) < 0.03 * n
    _, sums = token_multipliers(world.inputs, PBSDConfig(snr_gate=1e9))
    assert [float(sums[f"loss/pbsd_{k}"]) for k in ("clip_fraction", "snr_kept", "multiplier_deviation")] == [0, 0, 0]
    x = world.inputs
    expected = ((x["teacher_log_probs"].double() - x["old_log_probs"]) * (1 - x["answer_mask"])).sum()
    assert float(sums["loss/pbsd_evidence"]) == pytest.approx(float(expected))


def test_a_token_without_a_turn_is_an_error():
    x = make_world(0, True).inputs
    x["turn_index"][3] = -1
    with pytest.raises(LossError, match="turn_index is -1"):
        token_multipliers(x, PBSDConfig())

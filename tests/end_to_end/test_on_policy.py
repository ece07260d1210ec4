"""On exactly on-policy data the forward pass for the old log-probs is saved, and nothing else changes."""

from __future__ import annotations

import pytest
from pbsd_process import INLINE, SMALL

from megatron_pbsd.observability.records import read_trajectories

STEPS = 2
SEQUENCES = 16
"""Trajectories of a step of a SMALL run."""


@pytest.mark.slow
def test_pbsd_in_the_loss_is_pbsd_before_the_update(pbsd):
    """The teacher's pass alone, and evidence from the update's own log-probs: the same credit, loss and gradient."""
    options = (*SMALL, *INLINE, "--steps", str(STEPS))
    lean = pbsd("on-policy", *options)
    lean_rows = lean.succeed()
    whole = pbsd("recomputed", *options, "--learner.recompute_log_probs", "always")
    whole_rows = whole.succeed()
    for ours, theirs in zip(lean_rows[1:], whole_rows[1:], strict=True):
        assert (ours["log_probs/sequences"], theirs["log_probs/sequences"]) == (SEQUENCES, 2 * SEQUENCES)
        assert ours["loss/ratio_mean"] == ours["loss/ratio_max"] == 1.0
        keys = [key for key in theirs if key.startswith("credit/") and key != "credit/clip_fraction"]
        assert len(keys) >= 4
        for key in (*keys, "loss/total", "loss/entropy", "grad_norm"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-6), key
        for one, other in zip(trajectories(lean, ours["step"]), trajectories(whole, theirs["step"]), strict=True):
            assert [turn.tokens for turn in one.turns] == [turn.tokens for turn in other.turns]
            assert one.evidence == pytest.approx(other.evidence, rel=1e-4, abs=1e-4)
            assert one.turn_advantages == pytest.approx(other.turn_advantages, rel=1e-4, abs=1e-4)


def trajectories(run, step):
    return [recorded.trajectory for recorded in read_trajectories(run.folder, step)]


def test_grpo_needs_no_pass_before_the_update(pbsd):
    (row,) = pbsd("grpo", *SMALL, *INLINE, "--steps", "1", "--algorithm.name", "grpo").succeed()[1:]
    assert row["log_probs/sequences"] == 0
    assert row["loss/ratio_mean"] == row["loss/ratio_max"] == 1.0


@pytest.mark.slow
def test_ppo_asks_for_values_alone(pbsd):
    """A new value head says 0 everywhere: the first step's returns are GAE's of the rewards."""
    run = pbsd("ppo", *SMALL, *INLINE, "--steps", "1", "--algorithm.name", "ppo", "--algorithm.gae_lambda", "1")
    (row,) = run.succeed()[1:]
    assert row["log_probs/sequences"] == SEQUENCES
    assert row["loss/ratio_max"] == 1.0
    members = trajectories(run, 1)
    mean = sum(t.reward * t.generated for t in members) / sum(t.generated for t in members)
    assert row["loss/returns"] == pytest.approx(mean, rel=1e-5)


@pytest.mark.slow
def test_the_reference_stays_what_the_run_started_from(pbsd):
    """At first policy and reference are the same; after a step the policy has moved and the reference has not."""
    first, second = pbsd("penalised", *SMALL, *INLINE, "--steps", "2", "--algorithm.name", "reinforce_pp",
                         "--algorithm.kl_penalty", "0.1").succeed()[1:]
    assert abs(first["credit/kl_reference"]) < 1e-5
    assert abs(second["credit/kl_reference"]) > 1e-4


@pytest.mark.slow
def test_dynamic_sampling_trains_on_what_differs_and_keeps_the_rest(pbsd):
    run = pbsd("dapo", *SMALL, *INLINE, "--steps", "1", "--algorithm.name", "dapo",
               "--algorithm.sampling_attempts", "2")
    (row,) = run.succeed()[1:]
    members = trajectories(run, 1)
    assert len(members) == SEQUENCES * row["rollout/attempts"] == SEQUENCES * 2
    trained = [t for t in members if t.turn_advantages is not None]
    assert sum(t.generated for t in trained) == row["tokens"]
    rewards: dict[str, set[float]] = {}
    for t in trained:
        rewards.setdefault(t.group_id, set()).add(t.reward)
    assert 0 < len(rewards) <= 4 and all(len(values) > 1 for values in rewards.values())

"""Which forward passes a step makes, and that what they return ends up at the right tokens."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from megatron_pbsd import credit
from megatron_pbsd.algorithms import build_algorithm
from megatron_pbsd.config import (
    CustomLossConfig,
    DistillConfig,
    GRPOConfig,
    LearnerConfig,
    PBSDConfig,
    PPOConfig,
    ReinforcePPConfig,
    RLOOConfig,
    RunConfig,
)
from megatron_pbsd.errors import UsageError
from megatron_pbsd.learner.update import Update
from megatron_pbsd.losses import Loss
from megatron_pbsd.trajectory import Group, Trajectory, Turn, VersionSpan

POLICY = ("advantages", "rollout_log_probs")
PBSD = (*POLICY, "teacher_log_probs", "turn_index", "answer_mask")


def loss(*fields: str) -> Loss:
    return Loss("test", fields, len)


@pytest.mark.parametrize(("config", "on_policy", "fields", "passes"), [
    (GRPOConfig(), True, POLICY, {}),
    (GRPOConfig(), False, (*POLICY, "old_log_probs"), {"student": ("log_probs",)}),
    (RLOOConfig(), True, POLICY, {}),
    (PBSDConfig(), True, PBSD, {"teacher": ("log_probs",)}),
    (PBSDConfig(), False, (*POLICY, "old_log_probs"), {"student": ("log_probs",), "teacher": ("log_probs",)}),
    (ReinforcePPConfig(), True, POLICY, {}),
    (ReinforcePPConfig(kl_penalty=0.1), True, POLICY, {"student": ("log_probs",), "reference": ("log_probs",)}),
    (PPOConfig(), True, (*POLICY, "values", "returns"), {"student": ("values",)}),
    (PPOConfig(), False, (*POLICY, "old_log_probs", "values", "returns"), {"student": ("log_probs", "values")}),
    (DistillConfig(), True, POLICY, {"student": ("log_probs",), "teacher": ("log_probs",)}),
    # Losses that ask the teacher themselves and read no algorithm's advantages.
    (DistillConfig(), True, ("teacher_top_tokens", "teacher_top_log_probs"),
     {"teacher": ("top_tokens", "top_log_probs")}),
    (DistillConfig(), True, ("teacher_log_probs",), {"teacher": ("log_probs",)}),
    (GRPOConfig(), True, (*POLICY, "reference_log_probs"), {"reference": ("log_probs",)}),
])
def test_passes(config, on_policy, fields, passes):
    plan = credit.plan(build_algorithm(config), loss(*fields), on_policy, top=2)
    assert plan.passes == passes
    assert (plan.loss is not None) == on_policy


@pytest.mark.parametrize(("field", "message"), [
    ("returns", "GRPO has no returns"), ("teacher_top_tokens", "GRPO has no teacher")])
def test_what_the_algorithm_cannot_provide_is_refused(field, message):
    with pytest.raises(UsageError, match=message):
        credit.plan(build_algorithm(GRPOConfig()), loss(*POLICY, field), on_policy=False)


def turn(rng, version=3, tokens=None):
    n = int(rng.integers(1, 5)) if tokens is None else tokens
    return Turn(tuple(map(int, rng.integers(0, 50, n))), (-0.5,) * n, tuple(map(int, rng.integers(0, 50, 3))), "search",
                "stop", (VersionSpan(version, 0, n),), (0, n - 1) if n > 1 else None)


def make_groups(sizes, seed=0, version=3):
    """Groups of these sizes; privileged prompts are longer than the others, by a different number each."""
    rng, groups = np.random.default_rng(seed), []
    for g, size in enumerate(sizes):
        members = []
        for i in range(size):
            prompt = tuple(map(int, rng.integers(0, 50, int(rng.integers(1, 6)))))
            privileged = prompt + tuple(map(int, rng.integers(0, 50, int(rng.integers(1, 9)))))
            turns = tuple(turn(rng, version) for _ in range(int(rng.integers(1, 4))))
            members.append(Trajectory(f"3/{g}/{i}", str(g), "t", prompt, privileged, turns, float(rng.integers(0, 2))))
        groups.append(Group(str(g), tuple(members)))
    return groups


def number(tokens, position):
    """Something that identifies a token in its context, as a log-prob does."""
    return np.float32(-(hash(tuple(map(int, tokens[: position + 1]))) % 9973) / 1000)


class Model:
    """Scores like a learner: `[T]` or `[T, 2]` per sequence, from nothing but the tokens up to each position."""

    def __init__(self):
        self.calls = []

    def score(self, batch, outputs, top):
        self.calls.append((batch.size, list(outputs), top))
        rows = [np.array([number(t, i) for i in range(len(t))], np.float32) for t in batch["tokens"]]
        shaped = {"log_probs": rows, "values": [r * 2 for r in rows], "top_log_probs": [
            np.stack([r, r - 1], -1) for r in rows], "top_tokens": [
            np.stack([np.arange(len(r))] * 2, -1) for r in rows]}
        return {name: shaped[name] for name in outputs}


class Frozen:
    """Another model, as the reference is one."""

    def score(self, sequences):
        return [[np.array([number(t, i) for i in range(len(t))], np.float32) + 5 for t in sequences]]


def generated(trajectory):
    """(position in the student's sequence, position in the teacher's) of every generated token."""
    places, at = [], 0
    for one in trajectory.turns:
        places += [(len(trajectory.prompt) + at + i, len(trajectory.privileged_prompt) + at + i)
                   for i in range(len(one.tokens))]
        at += len(one.tokens) + len(one.observation)
    return places


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(1, 3), min_size=1, max_size=3), st.integers(0, 1000))
def test_everything_scored_lies_at_the_students_token(sizes, seed):
    groups, model = make_groups(sizes, seed), Model()
    fields = (*credit.SOURCES, "returns", "advantages")
    plan = credit.plan(build_algorithm(PPOConfig(kl_penalty=0.1)), loss(*fields), on_policy=False, top=2)
    batch, _ = credit.prepare(plan, groups, model, Frozen())
    assert model.calls == [(2 * sum(sizes), ["log_probs", "values", "top_tokens", "top_log_probs"], 2)]
    trajectories = [t for group in groups for t in group.trajectories]
    for i, trajectory in enumerate(trajectories):
        student = [*trajectory.prompt, *trajectory.continuation]
        teacher = [*trajectory.privileged_prompt, *trajectory.continuation]
        places = generated(trajectory)
        assert np.flatnonzero(batch["loss_mask"][i]).tolist() == [s for s, _ in places]
        for s, t in places:
            assert batch["old_log_probs"][i][s] == number(student, s)
            assert batch["values"][i][s] == 2 * number(student, s)
            assert batch["reference_log_probs"][i][s] == number(student, s) + 5
            assert batch["teacher_log_probs"][i][s] == number(teacher, t)
            assert batch["teacher_top_tokens"][i][s].tolist() == [t, t]
            assert batch["teacher_top_log_probs"][i][s, 1] == number(teacher, t) - 1
        outside = np.setdiff1d(np.arange(len(student)), [s for s, _ in places])
        for name in fields:
            assert not batch[name][i][outside].any()
    assert [int(g) for g in batch["group"]] == [g for g, size in enumerate(sizes) for _ in range(size)]


def test_deferring_the_student_changes_nothing_that_is_reported():
    """PBSD on exactly on-policy data: one pass fewer, advantages of the outcome for the loss, and the same record."""
    groups, algorithm = make_groups([3, 2, 1], seed=7), build_algorithm(PBSDConfig(snr_gate=0.1))
    whole, early, model = credit.plan(algorithm, loss(*POLICY, "old_log_probs"), False), Model(), Model()
    batch, found = credit.prepare(whole, groups, early, None)
    expected, metrics = credit.conclude(whole, groups, batch, found, [])

    deferred = credit.plan(algorithm, loss(*PBSD), True)
    lean, begun = credit.prepare(deferred, groups, model, None)
    assert early.calls == [(12, ["log_probs"], 0)] and model.calls == [(6, ["log_probs"], 0)]
    assert "old_log_probs" not in lean
    outcome = build_algorithm(GRPOConfig()).assign(credit.outcomes([t for g in groups for t in g.trajectories], lean))
    for row, mask, advantage in zip(lean["advantages"], lean["loss_mask"], outcome.advantages, strict=True):
        np.testing.assert_array_equal(row[mask > 0], advantage)

    update = Update({}, batch["old_log_probs"])
    got, reported = credit.conclude(deferred, groups, lean, begun, [update])
    assert got == expected
    assert reported | {"log_probs/sequences": 12.0} == metrics
    assert reported["log_probs/sequences"] == 6.0


def test_a_loss_that_reads_no_credit_gets_none():
    groups = make_groups([2, 1], seed=3)
    plan = credit.plan(build_algorithm(DistillConfig()), loss("teacher_top_tokens"), on_policy=False, top=2)
    batch, credited = credit.prepare(plan, groups, Model(), None)
    assert credited is None and "advantages" not in batch
    assert credit.conclude(plan, groups, batch, None, []) == (groups, {"log_probs/sequences": 3.0})


def test_on_policy_is_read_off_the_tokens():
    trajectories = [t for group in make_groups([2, 2]) for t in group.trajectories]
    once = LearnerConfig(updates_per_step=1)
    assert credit.is_on_policy(trajectories, 3, once)
    assert not credit.is_on_policy(trajectories, 4, once)
    assert not credit.is_on_policy(trajectories, 3, LearnerConfig(updates_per_step=2))
    assert not credit.is_on_policy(trajectories, 3, LearnerConfig(recompute_log_probs="always"))
    # One turn of one trajectory went on under new weights.
    last = trajectories[-1].turns[-1]
    n = len(last.tokens)
    mixed = replace(last, versions=(VersionSpan(2, 0, n - 1), VersionSpan(3, n - 1, n)) if n > 1 else (
        VersionSpan(2, 0, n),))
    carried = replace(trajectories[-1], turns=(*trajectories[-1].turns[:-1], mixed))
    assert not credit.is_on_policy([*trajectories[:-1], carried], 3, once)


def older_trajectory():
    """Of five generated tokens weights 2 generated the first three, and the second turn begins with one of them."""
    turns = (Turn((5, 6), (-0.5,) * 2, (9, 9), "search", "stop", (VersionSpan(2, 0, 2),)),
             Turn((7, 8, 1), (-0.5,) * 3, (), "answer", "stop", (VersionSpan(2, 0, 1), VersionSpan(3, 1, 3))))
    return Trajectory("2/0/0", "0", "t", (1, 2), (1, 2, 3), turns, 1.0)


def run_config(**rollout):
    return RunConfig.model_validate({
        "name": "n", "steps": 1, "model": {"path": "m"}, "learner": {"updates_per_step": 1},
        "rollout": {"over_sampling": 2.0, "max_staleness": 1, **rollout}})


@pytest.mark.parametrize("algorithm", [GRPOConfig(), PBSDConfig()])
def test_stale_tokens_are_marked_where_they_are_masked(algorithm):
    groups = [Group("0", (older_trajectory(),))]
    masked = run_config(stale_tokens="mask").model_copy(update={"algorithm": algorithm})
    corrected = run_config().model_copy(update={"algorithm": algorithm})
    plan = credit.plan_for(masked, groups, version=3)
    batch, _ = credit.prepare(plan, groups, Model(), None)
    np.testing.assert_array_equal(batch["stale"][0], [0, 0, 1, 1, 0, 0, 1, 0, 0])
    assert "stale" in credit.loss_of(masked, on_policy=False).fields
    # The learner's own loss, and the pass for the old log-probs: not the shortcut for data of the present weights.
    for config in (masked, corrected):
        plan = credit.plan_for(config, groups, version=3)
        assert plan.loss is None and not plan.deferred and "old_log_probs" in plan.fields
    batch, _ = credit.prepare(credit.plan_for(corrected, groups, version=3), groups, Model(), None)
    assert "stale" not in batch


def test_fresh_data_need_no_marks():
    plan = credit.plan_for(run_config(stale_tokens="mask"), make_groups([2], version=3), version=3)
    assert plan.fresh is None and plan.deferred and "stale" not in plan.loss.fields


def test_a_custom_loss_has_to_read_what_it_is_to_correct_by():
    loss = CustomLossConfig(file="docs/examples/early_turns_loss.py")
    config = run_config().model_copy(update={"algorithm": GRPOConfig(loss=loss)})
    with pytest.raises(UsageError, match="corrects nothing with loss 'early_turns', which does not read 'rollout_log"):
        credit.loss_of(config, on_policy=False)
    masked = run_config(stale_tokens="mask").model_copy(update={"algorithm": GRPOConfig(loss=loss)})
    assert set(credit.loss_of(masked, on_policy=False).fields) == {"advantages", "turn_index", "stale"}

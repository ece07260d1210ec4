"""The order of the data and the dealing of groups, as properties."""

import json

import numpy as np
import pytest
from hypothesis import given, strategies as st
from scripted_rollout import EchoEnvironment

from megatron_pbsd.batch import Batch
from megatron_pbsd.config import RunConfig
from megatron_pbsd.environments import Task
from megatron_pbsd.errors import UsageError
from megatron_pbsd.prompts import Stream, check_position, mini_batches, position, requests, tasks_between
from megatron_pbsd.rollout.coordinator import CollectStatistics
from megatron_pbsd.rollouts import Collected
from megatron_pbsd.train import roll_out
from megatron_pbsd.trajectory import Group, Trajectory, Turn, VersionSpan


@given(st.integers(1, 30), st.integers(0, 5), st.integers(1, 7), st.integers(1, 12))
def test_steps_read_on_where_the_last_one_stopped_and_each_epoch_asks_everything_once(count, seed, size, steps):
    tasks = list(range(count))
    whole = tasks_between(tasks, seed, 0, size * steps)
    assert whole == [t for s in range(steps) for t in tasks_between(tasks, seed, s * size, (s + 1) * size)]
    for epoch in range(size * steps // count):
        assert sorted(whole[epoch * count : (epoch + 1) * count]) == tasks


@given(st.lists(st.integers(1, 4), min_size=1, max_size=8), st.integers(1, 8))
def test_mini_batches_hold_whole_groups_and_every_sequence_once(sizes, count):
    groups = [group(g, [0.0] * size) for g, size in enumerate(sizes)]
    tokens = [np.array([g, i]) for g, size in enumerate(sizes) for i in range(size)]
    parts = list(mini_batches(groups, Batch({"tokens": tokens}), count))
    seen = [tuple(t) for part in parts for t in part["tokens"]]
    assert sorted(seen) == sorted(map(tuple, tokens))
    assert len(parts) == min(count, len(sizes))
    for part in parts:
        inside = [t[0] for t in part["tokens"]]
        assert all(inside.count(g) == sizes[g] for g in set(inside))


def group(g, rewards):
    turn = Turn((5, 1), (-0.5, -0.5), (), "answer", "stop", (VersionSpan(0, 0, 2),))
    return Group(str(g), tuple(
        Trajectory(f"1/{g}/{i}", str(g), "t", (1,), (1,), (turn,), r) for i, r in enumerate(rewards)))


@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 3), st.integers(1, 6))
def test_further_attempts_ask_what_no_other_rollout_of_the_epoch_asks(tasks, count, attempts, steps):
    config = RunConfig(name="n", steps=steps, model={"path": "m"}, rollout={"prompts_per_step": count},
                       algorithm={"name": "dapo", "sampling_attempts": attempts}, learner={"updates_per_step": 1})
    pool = [Task(f"t{i}", "q", ("a",), 1) for i in range(tasks)]
    stream, asked = Stream(), []
    for _ in range(steps):
        asked.append([requests(EchoEnvironment(), pool, config, stream, attempt) for attempt in range(attempts)])
        stream = stream.after(config)
    stream = [request.task.task_id for step in asked for rollout in step for request in rollout]
    for start in range(0, len(stream) - tasks + 1, tasks):
        assert len(set(stream[start : start + tasks])) == tasks
    for step in asked:
        ids = [request.group_id for rollout in step for request in rollout]
        assert len(set(ids)) == len(ids)


EQUAL, MIXED = [1.0, 1.0], [0.0, 1.0]


@pytest.mark.parametrize(("rewards", "chosen", "attempts"), [
    ([[MIXED, MIXED]], ["0", "1"], 1),
    ([[EQUAL, MIXED], [MIXED, MIXED]], ["1", "2"], 2),
    ([[EQUAL, MIXED], [EQUAL, EQUAL], [EQUAL, EQUAL]], ["1"], 3),
    ([[EQUAL, EQUAL], [EQUAL, EQUAL], [EQUAL, EQUAL]], ["0", "1"], 3),
])
def test_dynamic_sampling_replaces_groups_that_teach_nothing(rewards, chosen, attempts):
    asked = []
    groups, others, _, metrics = roll_out(*sampling(rewards, asked, name="dapo", sampling_attempts=3))
    assert [g.group_id for g in groups] == chosen
    assert asked == list(range(attempts)) and metrics["rollout/attempts"] == attempts
    assert sorted([g.group_id for g in groups + others], key=int) == [str(i) for i in range(2 * attempts)]
    assert metrics["rollout/tokens"] == 10 * attempts and metrics["rollout/tokens_per_s"] == 5
    # The reported reward is that of all that was asked.
    assert metrics["reward/mean"] == np.mean([r for rollout in rewards[:attempts] for g in rollout for r in g])


def sampling(rewards, asked, **algorithm):
    """A configuration of two prompts a step, and what answers with groups of the `rewards` of each attempt."""
    def ask(attempt):
        asked.append(attempt)
        groups = [group(2 * attempt + i, r) for i, r in enumerate(rewards[attempt])]
        return Collected(groups, CollectStatistics(1, 1, 10, 0, 0, 2.0, 0.5))

    return RunConfig(name="n", steps=1, model={"path": "m"}, rollout={"prompts_per_step": 2},
                     algorithm=algorithm, learner={"updates_per_step": 1}), ask


def test_without_dynamic_sampling_every_group_is_kept():
    groups, others, left, _ = roll_out(*sampling([[EQUAL, MIXED]], [], name="grpo"))
    assert [g.group_id for g in groups] == ["0", "1"] and not others and not left


def run_config(steps=9, seed=1, environment=None, **sections):
    return RunConfig.model_validate({"name": "n", "steps": steps, "seed": seed, "model": {"path": "m"},
                                     "environment": environment or {}, **sections})


def saved_at(asked, **sections):
    """As a checkpoint's manifest gives it back."""
    return json.loads(json.dumps(position(run_config(**sections), asked)))


DAPO = {"algorithm": {"name": "dapo", "sampling_attempts": 3}}
SFT = {"algorithm": {"name": "sft", "sequences_per_step": 64}}


@pytest.mark.parametrize(
    ("sections", "per_step"), [({}, 16), ({"rollout": {"prompts_per_step": 5}}, 5), (DAPO, 48), (SFT, 64)])
def test_a_run_goes_on_where_its_checkpoint_ends(sections, per_step):
    """With any other number of prompts per step, too."""
    stream = Stream().after(run_config(**sections)).after(run_config(**sections))
    assert stream == Stream(2 * per_step)
    saved = saved_at(stream.asked, **sections)
    for other in ({}, {"rollout": {"prompts_per_step": 3}}, DAPO):
        assert check_position(saved, run_config(steps=20, **other)) == 2 * per_step


def test_another_order_of_prompts_is_refused_with_every_key():
    saved = saved_at(4)
    with pytest.raises(UsageError, match=r"seed = 2, the checkpoint was made with 1; .*hops = \[1\], .* with \[1, 2"):
        check_position(saved, run_config(seed=2, environment={"hops": [1]}))
    with pytest.raises(UsageError, match="environment.train_split = 'heldout', the checkpoint was made with 'train'"):
        check_position(saved, run_config(environment={"train_split": "heldout"}))

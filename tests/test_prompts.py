"""The order of the data and the dealing of groups, as properties."""

import numpy as np
from hypothesis import given, strategies as st

from megatron_pbsd.batch import Batch
from megatron_pbsd.prompts import mini_batches, tasks_between
from megatron_pbsd.trajectory import Group, Trajectory


@given(st.integers(1, 30), st.integers(0, 5), st.integers(1, 7), st.integers(1, 12))
def test_steps_read_on_where_the_last_one_stopped_and_each_epoch_asks_everything_once(count, seed, size, steps):
    tasks = list(range(count))
    whole = tasks_between(tasks, seed, 0, size * steps)
    assert whole == [t for s in range(steps) for t in tasks_between(tasks, seed, s * size, (s + 1) * size)]
    for epoch in range(size * steps // count):
        assert sorted(whole[epoch * count : (epoch + 1) * count]) == tasks


@given(st.lists(st.integers(1, 4), min_size=1, max_size=8), st.integers(1, 8))
def test_mini_batches_hold_whole_groups_and_every_sequence_once(sizes, count):
    groups, tokens = [], []
    for g, size in enumerate(sizes):
        members = tuple(Trajectory(f"{g}/{i}", str(g), "t", (1,), (1,), ()) for i in range(size))
        groups.append(Group(str(g), members))
        tokens += [np.array([g, i]) for i in range(size)]
    parts = list(mini_batches(groups, Batch({"tokens": tokens}), count))
    seen = [tuple(t) for part in parts for t in part["tokens"]]
    assert sorted(seen) == sorted(map(tuple, tokens))
    for part in parts:
        inside = [t[0] for t in part["tokens"]]
        assert all(inside.count(g) == sizes[g] for g in set(inside))

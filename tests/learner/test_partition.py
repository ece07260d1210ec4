"""Number partitioning against plain references and exact search."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from megatron_pbsd.learner.partition import dealt, differencing, largest_sum, levelled, longest_first, refine

values_of = st.lists(st.integers(1, 1000), min_size=1, max_size=24)
parts_of = st.integers(1, 5)


def is_partition(groups, values, parts):
    return len(groups) == parts and sorted(i for group in groups for i in group) == list(range(len(values)))


def optimum(values, parts):
    return min(max(sum(v for v, p in zip(values, choice, strict=True) if p == part) for part in range(parts))
               for choice in product(range(parts), repeat=len(values)))


@given(values=values_of, parts=parts_of)
def test_every_value_is_in_one_group(values, parts):
    values = np.array(values, dtype=float)
    for groups in (longest_first(values, parts), differencing(values, parts), dealt(values, parts),
                   refine(values, dealt(values, parts))):
        assert is_partition(groups, values, parts)


@settings(deadline=None)
@given(values=st.lists(st.integers(1, 50), min_size=1, max_size=7), parts=st.integers(2, 3))
def test_longest_first_keeps_grahams_bound(values, parts):
    best = optimum(values, parts)
    assert largest_sum(np.array(values, float), longest_first(np.array(values, float), parts)) <= (
        4 / 3 - 1 / (3 * parts)) * best + 1e-9


def reference_differencing(values, parts):
    """The largest sum, from whole vectors of sums without groups."""
    states = [np.array([value] + [0.0] * (parts - 1)) for value in values]
    while len(states) > 1:
        states.sort(key=lambda state: state.max() - state.min())
        united = np.sort(states.pop()) + np.sort(states.pop())[::-1]
        states.append(united)
    return states[0].max()


@given(seed=st.integers(0, 10**6), count=st.integers(1, 30), parts=st.integers(1, 6))
def test_differencing_is_karmarkar_and_karps(seed, count, parts):
    # Real numbers: with ties the order of unions would be open.
    values = np.random.default_rng(seed).lognormal(size=count)
    assert largest_sum(values, differencing(values, parts)) == pytest.approx(reference_differencing(values, parts))


def test_differencing_on_the_textbook_example():
    assert largest_sum(np.array([8.0, 7, 6, 5, 4]), differencing(np.array([8.0, 7, 6, 5, 4]), 2)) == 16


@given(values=values_of, parts=parts_of, room=st.integers(0, 3))
def test_refine_never_raises_the_largest_sum_and_keeps_the_most(values, parts, room):
    values = np.array(values, dtype=float)
    most = -(-len(values) // parts) + room
    start = longest_first(values, parts, most)
    refined = refine(values, start, most)
    assert is_partition(refined, values, parts)
    assert max(map(len, start)) <= most and max(map(len, refined)) <= most
    assert largest_sum(values, refined) <= largest_sum(values, start)


@given(values=st.lists(st.integers(1, 1000), min_size=2, max_size=24), parts=st.integers(2, 5))
def test_refine_ends_where_no_exchange_with_the_smallest_helps(values, parts):
    values = np.array(values, dtype=float)
    groups = refine(values, dealt(values, parts))
    sums = [values[group].sum() for group in groups]
    top, low = int(np.argmax(sums)), int(np.argmin(sums))
    if sums[top] <= np.mean(sums) * (1 + 1e-3):
        return
    for given_away in values[groups[top]]:
        for taken in [0.0, *values[groups[low]]]:
            assert max(sums[top] - given_away + taken, sums[low] + given_away - taken) >= sums[top]


@given(seed=st.integers(0, 10**6), columns=st.integers(1, 6), parts=st.integers(1, 6))
def test_levelled_takes_one_of_each_column(seed, columns, parts):
    table = np.random.default_rng(seed).random((columns, parts))
    taken = levelled(table)
    assert (np.sort(taken, axis=1) == np.arange(parts)).all()
    sums = np.take_along_axis(table, taken, axis=1).sum(axis=0)
    # The largest is given to the least: no two sums are further apart than one column's values.
    assert sums.max() - sums.min() <= np.ptp(table, axis=1).max() + 1e-9

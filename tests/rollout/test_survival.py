"""Kaplan-Meier against the product written out length by length, and against lengths that are known."""

import numpy as np
import pytest
from hypothesis import given, strategies as st

from megatron_pbsd.rollout.survival import Seen, kaplan_meier

ROWS = st.lists(st.builds(
    lambda start, more, ended: Seen(start, start + more, ended), st.integers(0, 12), st.integers(0, 12), st.booleans()),
    max_size=30)


@given(ROWS, st.integers(0, 40))
def test_it_is_the_product_over_all_lengths(rows, further):
    share, expected = 1.0, []
    longest = max((row.stop for row in rows if row.stop > row.start), default=0)
    for length in range(1, longest + 1):
        watched = [row for row in rows if row.start < length <= row.stop]
        ended = [row for row in watched if row.ended and row.stop == length]
        if watched:
            share *= 1 - len(ended) / len(watched)
        expected.append(share)
    found = kaplan_meier(rows)
    assert found.longest == longest
    np.testing.assert_allclose(found.above, [expected[length - 1] for length in found.lengths], atol=1e-12)
    low, high = found.mean(longest + further)
    mean = sum([1.0, *expected][:longest])
    assert low == pytest.approx(mean)
    assert high == pytest.approx(mean + ([1.0, *expected][-1]) * further)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40))
def test_without_censoring_it_is_the_mean(lengths):
    low, high = kaplan_meier([Seen(0, length, True) for length in lengths]).mean(1000)
    assert low == pytest.approx(high) == pytest.approx(np.mean(lengths))


def test_nothing_seen_is_nothing_known():
    assert kaplan_meier([Seen(3, 3, False)]).mean(7) == (0.0, 7.0)


@pytest.mark.parametrize("late", [False, True])
def test_known_lengths_that_are_censored_and_entered_late_come_out(late):
    """20 000 geometric lengths of mean 40, watched until an independent length, and from one where `late`. The standard
    error of the estimate is under 1 here; the mean of those that were seen to end is far below."""
    random = np.random.default_rng(5)
    lengths, stops = random.geometric(1 / 40, 20_000), random.integers(1, 200, 20_000)
    starts = random.integers(0, 30, 20_000) * (random.random(20_000) < 0.5) if late else np.zeros(20_000, int)
    rows = [Seen(int(s), int(min(length, c)), bool(length <= c))
            for length, c, s in zip(lengths, stops, starts, strict=True) if min(length, c) > s]
    low, high = kaplan_meier(rows).mean(400)
    assert low <= high and low == pytest.approx(40, abs=2) and high == pytest.approx(40, abs=4)
    assert np.mean([row.stop for row in rows if row.ended and not row.start]) < 37

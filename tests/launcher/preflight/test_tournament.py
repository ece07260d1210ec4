"""Every pair meets once, and the slow node is the one that is named."""

from __future__ import annotations

from itertools import combinations

from hypothesis import given, strategies as st

from launcher.preflight.facts import Pair
from launcher.preflight.tournament import rounds, slow_nodes, slow_pairs


@given(st.lists(st.integers(0, 500), min_size=2, max_size=40, unique=True))
def test_every_pair_meets_once_and_nobody_plays_twice_in_a_round(nodes):
    found = rounds(nodes)
    assert len(found) == len(nodes) - 1 + len(nodes) % 2
    assert sorted(pair for one in found for pair in one) == sorted(combinations(sorted(nodes), 2))
    assert all(len({rank for pair in one for rank in pair}) == 2 * len(one) for one in found)


@st.composite
def clusters(draw):
    """(pairs, ranks of slow nodes): a pair is as fast as its slower node, give or take 10 %."""
    size = draw(st.integers(3, 16))
    slow = draw(st.sets(st.integers(0, size - 1), max_size=(size - 1) // 2))
    speed = draw(st.floats(0.01, 400))
    factors = {rank: draw(st.floats(0.05, 0.5)) if rank in slow else 1.0 for rank in range(size)}
    pairs = [Pair(a, b, 0, speed * min(factors[a], factors[b]) * draw(st.floats(0.9, 1.1)))
             for a, b in combinations(range(size), 2)]
    return pairs, slow


@given(clusters(), st.randoms())
def test_the_slow_nodes_are_named_and_no_others(cluster, random):
    pairs, slow = cluster
    random.shuffle(pairs)
    assert set(slow_nodes(pairs, 0.7)) == slow
    assert slow_pairs(pairs, 0.7) == []


@given(st.integers(4, 12), st.data())
def test_one_slow_pair_is_no_slow_node(size, data):
    both = data.draw(st.sampled_from(list(combinations(range(size), 2))))
    pairs = [Pair(*ranks, 0, 2.0 if ranks == both else 10.0) for ranks in combinations(range(size), 2)]
    assert slow_nodes(pairs, 0.7) == {}
    assert [((pair.first, pair.second), usual) for pair, usual in slow_pairs(pairs, 0.7)] == [(both, 10.0)]


def test_a_node_that_reaches_nobody_is_slow():
    pairs = [Pair(a, b, 0, None if 2 in (a, b) else 5.0, "refused") for a, b in combinations(range(4), 2)]
    assert slow_nodes(pairs, 0.7) == {2: 0.0}


def test_of_two_nodes_neither_is_called_slow():
    assert slow_nodes([Pair(0, 1, 0, 0.001)], 0.7) == {}

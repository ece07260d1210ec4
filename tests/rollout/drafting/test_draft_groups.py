from __future__ import annotations

import re

import pytest
from hypothesis import given, strategies as st

from megatron_pbsd.rollout.drafting.groups import DraftError, DraftGroups
from megatron_pbsd.rollout.drafting.suffix_automaton import Draft


def groups_with(**requests: list[int]) -> DraftGroups:
    groups = DraftGroups()
    groups.register("g")
    for request, tokens in requests.items():
        groups.update("g", request, 0, tokens)
    return groups


@given(st.lists(st.integers(0, 2), min_size=1, max_size=30),
       st.lists(st.tuples(st.integers(0, 5), st.integers(0, 8)), max_size=20))
def test_updates_may_come_again_and_late(tokens, pieces):
    """Pieces that begin before the end of what is known, and reach behind it or not."""
    groups, again = groups_with(a=[0, 1, 2, 0, 1], b=tokens), groups_with(a=[0, 1, 2, 0, 1])
    for back, count in pieces:
        start = max(0, again.known("g", "b") - back)
        again.update("g", "b", start, tokens[start : start + count])
    again.update("g", "b", 0, tokens)
    assert again.tokens == groups.tokens == 5 + len(tokens)
    assert again.paths("g", "b", 3, 5) == groups.paths("g", "b", 3, 5)


@pytest.mark.parametrize(("start", "tokens", "cause"), [
    (4, [1], "group 'g', request 'a': tokens from 4 on were told, but only 3 before them; tell those from 3 on"),
    (1, [6, 8, 9], "group 'g', request 'a': token 2 is 8, but was 7 before"),
])
def test_gaps_and_contradictions_are_refused_and_change_nothing(start, tokens, cause):
    groups = groups_with(a=[5, 6, 7])
    with pytest.raises(DraftError, match=re.escape(cause)):
        groups.update("g", "a", start, tokens)
    assert groups.known("g", "a") == groups.tokens == 3
    groups.update("g", "a", 1, [6, 7, 8])
    assert groups.known("g", "a") == 4


def test_unknown_names_are_refused_with_the_nearest():
    groups = groups_with(request=[1, 2])
    groups.register("3/train-17")
    with pytest.raises(DraftError, match="'3/train-71' is not registered; did you mean '3/train-17'"):
        groups.update("3/train-71", "a", 0, [1])
    with pytest.raises(DraftError, match="'g' knows no request 'requests'; did you mean 'request'"):
        groups.draft("g", "requests", 3)
    assert groups.known("nowhere", "a") == 0


def test_groups_do_not_mix_and_are_forgotten():
    groups = groups_with(a=[1, 2, 3, 1])
    groups.register("h")
    groups.update("h", "a", 0, [1])
    assert groups.draft("g", "a", 2) == Draft((2, 3), (1.0, 1.0)) and groups.draft("h", "a", 2) == Draft((), ())
    groups.forget("g")
    groups.forget("g")
    assert "g" not in groups and groups.tokens == 1


def test_beyond_the_budget_the_least_recently_used_group_goes():
    groups = DraftGroups(budget=10)
    for name in ("a", "b"):
        groups.register(name)
        groups.update(name, "r", 0, range(4))
    groups.register("a")
    groups.register("c")
    groups.update("c", "r", 0, range(4))
    assert [name in groups for name in "abc"] == [True, False, True] and groups.tokens == 8
    # One group may be larger than the budget.
    groups.update("c", "r", 4, range(40))
    assert [name in groups for name in "abc"] == [False, False, True] and groups.known("c", "r") == 44

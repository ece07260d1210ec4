from __future__ import annotations

from itertools import combinations, count

import numpy as np
import pytest
from hypothesis import given, strategies as st

from megatron_pbsd.rollout.drafting.draft_tree import NO_DRAFT, ROOT, DraftTree
from megatron_pbsd.rollout.drafting.suffix_automaton import Draft, SuffixAutomaton
from megatron_pbsd.rollout.drafting.verification import agreeing
from megatron_pbsd.rollout.engines.embedded.sampling import uniforms

KINDS = 3
path = st.lists(st.integers(0, KINDS - 1), max_size=6)
several = st.lists(path, max_size=5)


def of_nodes(tree: DraftTree) -> list[tuple[int, ...]]:
    """Of each node the tokens from the context to it."""
    paths: list[tuple[int, ...]] = []
    for token, parent in zip(tree.tokens, tree.parents, strict=True):
        paths.append((() if parent == ROOT else paths[parent]) + (token,))
    return paths


def beginnings(paths: list[list[int]], depth: int = 99) -> set[tuple[int, ...]]:
    return {tuple(path[:n]) for path in paths for n in range(1, min(len(path), depth) + 1)}


@given(several)
def test_a_node_for_each_beginning_of_a_path(paths):
    tree = DraftTree.of(paths)
    nodes = of_nodes(tree)
    assert len(set(nodes)) == len(nodes) == len(tree) and set(nodes) == beginnings(paths)
    assert tree.depths == tuple(map(len, nodes)) and tree.depth == max(map(len, paths), default=0)
    first = paths[0] if paths else []
    assert nodes[: len(first)] == [tuple(first[: i + 1]) for i in range(len(first))] and tree.trunk >= len(first)
    np.testing.assert_array_equal(tree.hidden, [[mine[: len(other)] != other for other in nodes] for mine in nodes]
                                  if nodes else np.empty((0, 0)))


@given(several, st.integers(0, 6))
def test_cut(paths, depth):
    tree = DraftTree.of(paths)
    cut = tree.cut(depth)
    assert cut == DraftTree.of([path[:depth] for path in paths])
    assert tree.first_path == DraftTree.line(tree.tokens[: tree.trunk]) and not tree.first_path.branches
    assert set(of_nodes(cut)) == beginnings(paths, depth)


@given(path, st.lists(st.integers(0, KINDS - 1), min_size=7, max_size=7))
def test_a_tree_of_one_path_is_a_linear_draft(line, sampled):
    tree = DraftTree.of([line])
    assert not tree.branches and tree == DraftTree.of([line, line[:3], line]) == DraftTree.line(line)
    assert tree.accepted(sampled) == list(range(agreeing(line, sampled)))
    assert np.array_equal(tree.hidden, ~np.tri(len(line), dtype=bool))
    assert DraftTree.of([]) == DraftTree.of([[]]) == NO_DRAFT


def sampled_after(context: tuple[int, ...], key: int, chances: np.ndarray) -> int:
    """A policy that remembers two tokens, and a random number of the position alone."""
    uniform = uniforms(np.array([key], np.uint64), np.array([len(context)], np.uint64))[0]
    return int(np.searchsorted(chances[context[-2:]].cumsum(), uniform, side="right").clip(max=KINDS - 1))


@given(several, st.integers(0, 2**32), st.integers(0, 20))
def test_what_is_accepted_is_what_sampling_one_by_one_gives(paths, key, seed):
    chances = np.random.default_rng(seed).dirichlet(np.ones(KINDS), (KINDS, KINDS))
    tree, context = DraftTree.of(paths), (0, 1, 2)
    sampled = [sampled_after(context + before, key, chances) for before in [(), *of_nodes(tree)]]
    accepted = tree.accepted(sampled)
    tokens = [sampled[1 + node] for node in (ROOT, *accepted)]
    one_by_one = list(context)
    for _ in range(8):
        one_by_one.append(sampled_after(tuple(one_by_one), key, chances))
    assert tokens == one_by_one[3 : 3 + len(tokens)]
    # And no path would have been accepted further.
    longest = max((agreeing(path, one_by_one[3:]) for path in paths), default=0)
    assert len(accepted) == longest and [tree.tokens[node] for node in accepted] == tokens[:longest]
    assert [tree.parents[node] for node in accepted] == [ROOT, *accepted[:-1]][:longest]
    assert accepted == sorted(accepted) and all(i <= node for i, node in zip(count(), accepted))


@st.composite
def drafted(draw) -> list[Draft]:
    automaton = SuffixAutomaton(8)
    for tokens in draw(st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=12), min_size=1, max_size=4)):
        automaton.append(automaton.add_sequence(), np.array(tokens, np.int32))
    return automaton.paths(0, draw(st.integers(1, 4)), draw(st.integers(1, 3)))


@given(drafted(), st.integers(0, 5))
def test_no_other_tree_of_as_many_nodes_is_expected_to_keep_more(drafts, nodes):
    chances = {d.tokens[: i + 1]: d.chances[i] for d in drafts for i in range(len(d.tokens))}
    tree = DraftTree.likeliest(drafts, nodes)
    chosen = of_nodes(tree)
    assert len(set(chosen)) == len(chosen) == min(nodes, len(chances)) and set(chosen) <= set(chances)
    best = max((sum(chances[b] for b in others) for others in combinations(chances, len(chosen))
                if all(b[:-1] in others for b in others if len(b) > 1)), default=0.0)
    assert sum(chances[b] for b in chosen) == pytest.approx(best)


@given(drafted(), st.integers(0, 5), st.integers(0, 3))
def test_a_node_attends_to_what_it_follows(drafts, nodes, spare):
    tree = DraftTree.likeliest(drafts, nodes)
    chosen = [(), *of_nodes(tree)]
    mask = tree.mask(len(chosen) + spare)
    for node, beginning in enumerate(chosen):
        followed = {chosen.index(beginning[:i]) for i in range(len(beginning) + 1)}
        assert set(np.flatnonzero(mask[node]).tolist()) == followed and max(followed) == node
    for slot in range(len(chosen), len(mask)):
        assert np.flatnonzero(mask[slot]).tolist() == np.flatnonzero(mask[:, slot]).tolist() == [slot]

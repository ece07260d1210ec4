from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from megatron_pbsd.rollout.drafting.suffix_automaton import Draft, SuffixAutomaton


class BruteForce:
    """Nothing but the sequences, searched through at every question."""

    def __init__(self, depth: int):
        self.depth = depth
        self.sequences: list[list[int]] = []

    def append(self, sequence: int, tokens: list[int]) -> None:
        self.sequences[sequence] += tokens

    def continuations(self, suffix: list[int]) -> Counter[int]:
        n = len(suffix)
        return Counter(s[i + n] for s in self.sequences for i in range(len(s) - n) if s[i : i + n] == suffix)

    def match(self, sequence: int) -> list[int]:
        tokens = self.sequences[sequence]
        suffixes = (tokens[-n:] for n in range(min(self.depth - 1, len(tokens)), 0, -1))
        return next((suffix for suffix in suffixes if self.continuations(suffix)), [])

    def paths(self, sequence: int, width: int, longest: int, least: float) -> list[Draft]:
        match = self.match(sequence)
        if not match:
            return []
        beams = [((), (1.0,))]
        for _ in range(longest):
            candidates = []
            for tokens, chances in beams:
                following = self.continuations([*match, *tokens][-(self.depth - 1) :])
                ranked = sorted(following.items(), key=lambda item: (-item[1], item[0]))
                grown = [((*tokens, token), (*chances, chances[-1] * (count / following.total())))
                         for token, count in ranked]
                grown = [beam for beam in grown if beam[1][-1] >= least] if len(tokens) == _ else []
                candidates += grown or ([(tokens, chances)] if tokens else [])
            beams = sorted(candidates, key=lambda beam: -beam[1][-1])[:width]
        return [Draft(tokens, chances[1:]) for tokens, chances in beams]


@st.composite
def histories(draw):
    """Tokens of few kinds, so that they repeat, appended to several sequences in turn."""
    kinds = draw(st.integers(1, 4))
    appended = st.tuples(st.integers(0, 3), st.lists(st.integers(0, kinds - 1), max_size=12))
    return draw(st.integers(2, 9)), draw(st.lists(appended, max_size=14))


@settings(max_examples=150, deadline=None)
@given(histories(), st.integers(1, 4), st.integers(1, 6), st.sampled_from([0.0, 0.15, 0.5, 1.0]))
def test_paths_are_those_that_a_search_through_all_sequences_finds(history, width, longest, least):
    depth, appended = history
    automaton, reference = SuffixAutomaton(depth), BruteForce(depth)
    for _ in range(4):
        automaton.add_sequence()
        reference.sequences.append([])
    for sequence, tokens in appended:
        automaton.append(sequence, np.array(tokens, np.int32))
        reference.append(sequence, tokens)
        for member in range(4):
            assert automaton.paths(member, width, longest, least) == reference.paths(member, width, longest, least)
            assert automaton.draft(member, longest, least) == next(
                iter(reference.paths(member, 1, longest, least)), Draft((), ()))
    assert automaton.tokens == sum(map(len, reference.sequences))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 30_000), max_size=300), st.lists(st.integers(1, 40), min_size=1))
def test_pieces_and_large_vocabularies(tokens, cuts):
    whole, cut = SuffixAutomaton(6), SuffixAutomaton(6)
    for automaton in (whole, cut):
        automaton.add_sequence()
    whole.append(0, np.array(tokens, np.int32))
    rest = list(tokens)
    while rest:
        for n in cuts:
            cut.append(0, np.array(rest[:n], np.int32))
            rest = rest[n:]
    assert cut.paths(0, 3, 5) == whole.paths(0, 3, 5)


def test_a_member_is_drafted_for_from_its_siblings():
    automaton = SuffixAutomaton()
    ours, sibling = automaton.add_sequence(), automaton.add_sequence()
    automaton.append(sibling, np.array([7, 1, 2, 3, 4, 5], np.int32))
    assert automaton.draft(ours, 8) == Draft((), ())
    automaton.append(ours, np.array([9, 1, 2], np.int32))
    assert automaton.draft(ours, 2) == Draft((3, 4), (1.0, 1.0))
    assert automaton.draft(ours, 0) == Draft((), ())


def test_endless_repetition_costs_no_more_than_other_tokens():
    """A link path, which each appended token walks, would be as long as the sequence."""
    automaton = SuffixAutomaton(32)
    automaton.add_sequence()
    automaton.append(0, np.zeros(100_000, np.int32))
    assert automaton.draft(0, 8) == Draft((0,) * 8, pytest.approx((1.0,) * 8))

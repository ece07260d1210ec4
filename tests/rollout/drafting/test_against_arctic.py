"""Drafts beside those of arctic-inference's suffix tree, where it is installed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from megatron_pbsd.rollout.drafting.suffix_automaton import SuffixAutomaton

arctic = pytest.importorskip(
    "arctic_inference.suffix_decoding._C", reason="arctic-inference is not installed: see docs/speculation.md")

DEPTH, LONGEST, KINDS = 12, 8, 3


@settings(max_examples=150)
@given(st.lists(st.lists(st.integers(0, KINDS - 1), max_size=60), min_size=1, max_size=4), st.integers(1, 9))
def test_the_same_tokens_with_the_same_chances(sequences, piece):
    """What is likely to follow a token, nine tokens deep. Equally likely tokens may be told in any order: paths are
    compared up to the first choice between such."""
    ours, theirs = SuffixAutomaton(DEPTH), arctic.SuffixTree(DEPTH)
    for i, tokens in enumerate(sequences):
        # Arctic counts what stands at the end of a sequence among what was followed by something. Every sequence ends
        # with a token of its own, so that nothing else does.
        whole = np.array([*tokens, KINDS + i], np.int32)
        ours.add_sequence()
        for start in range(0, len(whole), piece):
            ours.append(i, whole[start : start + piece])
            theirs.extend_ndarray(i, whole[start : start + piece])
    for token in range(KINDS):
        reader = ours.add_sequence()
        ours.append(reader, np.array([token], np.int32))
        mine = ours.draft(reader, LONGEST)
        # It matches all of the context but the first token.
        draft = theirs.speculate_ndarray(np.array([99, token], np.int32), LONGEST, 0.0, float(LONGEST), 0.0, False)
        assert len(mine.tokens) == len(draft.token_ids) or mine.tokens != tuple(draft.token_ids)
        for a, chance, b, other in zip(mine.tokens, mine.chances, draft.token_ids, draft.probs):
            assert chance == pytest.approx(other, rel=1e-5)
            if a != b:
                break

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, strategies as st

from megatron_pbsd.rollout.drafting.verification import accepted_or_resampled, agreeing

CHI_SQUARE_26 = 54.05
"""99.9 % quantile of the chi-square distribution with 26 degrees of freedom."""


@given(st.lists(st.integers(0, 2), max_size=6), st.lists(st.integers(0, 2), min_size=7, max_size=7))
def test_agreeing_is_the_common_prefix(draft, sampled):
    n = agreeing(draft, sampled)
    assert list(draft[:n]) == sampled[:n] and (n == len(draft) or draft[n] != sampled[n])


@pytest.mark.parametrize("certain", [False, True], ids=["drafts drawn", "drafts certain"])
def test_the_first_tokens_are_distributed_as_the_model_has_them(certain):
    """Three tokens of three kinds: 27 sequences, whose frequencies are compared with a chain's probabilities."""
    rng = np.random.default_rng(3)
    first, after = rng.dirichlet(np.ones(3)), rng.dirichlet(np.ones(3), 3)
    drafter = np.eye(3)[[2, 0, 1]] if certain else rng.dirichlet(np.ones(3), 3)
    counts = np.zeros((3, 3, 3))
    for _ in range(20_000):
        tokens: list[int] = []
        while len(tokens) < 3:
            last, draft, q, p = (tokens or [None])[-1], [], [], []
            for _ in range(2):
                q.append(drafter[last or 0])
                p.append(first if last is None else after[last])
                draft.append(last := int(rng.choice(3, p=q[-1])))
            p.append(after[last])
            tokens += accepted_or_resampled(draft, np.array(q), np.array(p), rng.random((3, 2)))
        counts[tuple(tokens[:3])] += 1
    expected = np.array([first[a] * after[a, b] * after[b, c] for a, b, c in product(range(3), repeat=3)])
    expected = expected.reshape(3, 3, 3) * counts.sum()
    assert ((counts - expected) ** 2 / expected).sum() < CHI_SQUARE_26


def test_what_the_model_never_says_is_never_accepted():
    draft, q = [0], np.array([[1.0, 0.0, 0.0]])
    target = np.array([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    assert accepted_or_resampled(draft, q, target, np.zeros((2, 2))) == [1]
    assert accepted_or_resampled([1], target[:1], target, np.full((2, 2), 1 - 2.0**-53)) == [1, 2]

"""How alike the members of a group are, learned from those that are over and those that are not."""

from math import log

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from megatron_pbsd.rollout.length_correlation import RHOS, UNKNOWN, LengthCorrelation
from megatron_pbsd.rollout.length_history import LengthHistory
from megatron_pbsd.rollout.length_model import LengthModel

LIMIT = 40_000
SHARES = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)
FORMS = {
    "normal logarithms": lambda u: np.exp(8.6 + 0.8 * u),
    "Pareto's": lambda u: 1500 * (1 - above(u)) ** (-1 / 1.5),
    "two humps": lambda u: np.where(u < 0.3, 300 * np.exp(0.2 * u), 9000 * np.exp(0.2 * u)),
}


def above(u):
    """Of standard normals, which part of them is below each: their rank."""
    return (np.argsort(np.argsort(u, axis=None)).reshape(u.shape) + 0.5) / u.size


def drawn(share, form, groups=400, members=8, seed=0):
    rng = np.random.default_rng(seed)
    u = share ** 0.5 * rng.standard_normal((groups, 1)) + (1 - share) ** 0.5 * rng.standard_normal((groups, members))
    return np.minimum(FORMS[form](u), LIMIT).astype(int) + 1


def watched(lengths, reached):
    """All members have run up to `reached` tokens; those that are not over then go on."""
    learned = LengthCorrelation(LIMIT)
    for group, row in enumerate(lengths):
        for tokens in row:
            if tokens > reached:
                learned.moved(f"{group}", 0.0, log(reached))
    for group, row in enumerate(lengths):
        for tokens in row[row <= reached]:
            learned.finished(f"{group}", 0.0, log(tokens))
    return learned.share


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("share", SHARES)
def test_the_correlation_is_learned_whatever_the_form_of_lengths(share, form):
    assert watched(drawn(share, form), LIMIT + 1) == pytest.approx(share, abs=0.11)


@pytest.mark.parametrize("share", SHARES)
def test_and_when_only_one_in_eight_is_over(share):
    lengths = drawn(share, "normal logarithms")
    assert watched(lengths, int(np.quantile(lengths, 1 / 8))) == pytest.approx(share, abs=0.15)


def test_members_without_siblings_say_nothing():
    assert watched(drawn(0.9, "normal logarithms", members=1), LIMIT + 1) == pytest.approx(RHOS.mean(), abs=0.1)


def test_of_a_first_rollout_it_is_learned_and_of_later_ones_it_is_known():
    first, later = LengthCorrelation(LIMIT), LengthCorrelation(LIMIT, 0.8)
    assert first.share == UNKNOWN
    for learned in (first, later):
        for group, length in enumerate((2.0, 5.0, 8.0)):
            for _ in range(3):
                learned.finished(f"{group}", 0.0, length)
    assert first.share > 0.6 and later.share == 0.8


@pytest.mark.parametrize("share", SHARES)
def test_the_history_knows_it_of_lengths_that_are_all_known(share):
    history = LengthHistory()
    for task, lengths in enumerate(drawn(share, "normal logarithms", members=6)):
        history.asked(f"{task}", lengths[:4 + task % 3])
    assert history.share == pytest.approx(share, abs=0.08)


def test_a_history_of_single_answers_does_not_tell():
    history = LengthHistory()
    assert history.share is None
    history.asked("a", [5])
    history.asked("b", [9])
    assert history.share is None
    history.asked("a", [5, 5])
    history.asked("b", [9, 9])
    assert history.share == 1.0


@settings(deadline=None)
@given(st.sampled_from((0.0, 0.5, 1.0)) | st.floats(0, 1), st.integers(1, 500))
def test_urgency_is_between_what_is_likely_and_what_is_possible(share, tokens):
    model = LengthModel(1000, share=share)
    for i, length in enumerate((100, 150, 90)):
        model.started("g", f"{i}")
        model.finished("g", f"{i}", length)
    likely, room = model.remaining("g", tokens), 1000 - tokens
    assert likely - 1e-9 <= model.urgency("g", tokens) <= room + 1e-9
    if share in (0.0, 0.5, 1.0):
        assert model.urgency("g", tokens) == pytest.approx(room - share * (room - likely))

"""What is learned of lengths while a rollout runs."""

from math import exp, log, sqrt

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from megatron_pbsd.rollout.length_context import Calibration, LengthContext
from megatron_pbsd.rollout.length_model import LengthModel, _mean_above

LIMIT = 1000


def test_an_unknown_group_is_taken_to_be_as_long_as_allowed():
    context = LengthContext(LIMIT)
    assert context.estimate("g") == LIMIT and not context.known("g")
    context.finished("g", 30)
    context.finished("g", 80)
    context.finished("g", 50)
    assert context.estimate("g") == 80 and context.known("g")


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, LIMIT)), max_size=30))
def test_estimates_are_the_longest_length_seen(events):
    context = LengthContext(LIMIT)
    finished = {"a": [], "b": []}
    for group, tokens in events:
        before = context.estimate(group)
        changed = context.finished(group, tokens)
        finished[group].append(tokens)
        assert context.estimate(group) == max(finished[group])
        assert changed == (max(finished[group]) != before)
    assert context.next_prior() == {group: max(lengths) for group, lengths in finished.items() if lengths}


def test_a_prompt_seen_before_begins_with_what_it_was():
    context = LengthContext(LIMIT, {"seen": 70, "huge": 5000})
    assert context.estimate("seen") == 70 and context.known("seen") and not context.known("new")
    assert context.estimate("huge") == LIMIT
    context.finished("seen", 20)
    assert context.estimate("seen") == 20
    assert context.next_prior() == {"seen": 20, "huge": 5000}


def test_calibration_compares_what_was_said_with_what_came():
    context = LengthContext(LIMIT)
    for tokens in (100, 50, 200):  # the first is not predicted; then 100 for 50, 100 for 200
        context.finished("g", tokens)
    assert context.calibration.metrics() == pytest.approx({"count": 2, "bias": 1.0, "error": 2.0, "covered": 0.5})
    assert Calibration().metrics()["count"] == 0


@settings(deadline=None)
@given(st.floats(-3, 8), st.floats(0.1, 3))
def test_mean_of_what_is_above_a_bound(bound, deviation):
    nearest = max(bound, 0.0)
    grid = np.linspace(bound, nearest + 12 * deviation, 50001)
    density = np.exp(((nearest / deviation) ** 2 - (grid / deviation) ** 2) / 2)
    wanted = (grid * density).sum() / density.sum()
    tolerance = 0.05 * deviation if bound > 5 * deviation else 2e-3 * deviation
    assert _mean_above(bound, 0.0, deviation) == pytest.approx(wanted, abs=tolerance)


def learned(groups, members, between, within, seed=0):
    rng = np.random.default_rng(seed)
    means = log(100) + between * rng.standard_normal(groups)
    lengths = np.exp(means[:, None] + within * rng.standard_normal((groups, members)))
    model = LengthModel(10 ** 6)
    for g in range(groups):
        for i in range(members):
            model.started(f"{g}", f"{i}")
        for i in range(members):
            model.finished(f"{g}", f"{i}", int(lengths[g, i]) + 1)
    return model


def test_variances_are_learned_from_finished_groups():
    model = learned(400, 8, between=0.5, within=0.25)
    assert sqrt(model.within) == pytest.approx(0.25, abs=0.05)
    assert sqrt(model.between) == pytest.approx(0.5, abs=0.08)


def test_the_median_is_learned():
    """Of 1500 new members, each in a group of which four have finished, half are longer than typical."""
    model, rng = learned(400, 8, between=0.5, within=0.3), np.random.default_rng(1)
    for g in range(1500):
        mean = log(100) + 0.5 * rng.standard_normal()
        for i in range(5):
            model.started(f"new{g}", f"{i}")
            model.finished(f"new{g}", f"{i}", int(exp(mean + 0.3 * rng.standard_normal())) + 1)
    metrics = model.calibration.metrics()
    assert metrics["bias"] == pytest.approx(1, abs=0.1) and metrics["covered"] == pytest.approx(0.5, abs=0.08)


def test_the_more_requests_the_less_is_risked():
    few, many = learned(50, 8, 0.5, 0.3), learned(50, 8, 0.5, 0.3)
    for _ in range(10_000):
        many.submitted()
    for model in (few, many):
        model.started("g", "0")
        model.finished("g", "0", 100)
    assert many.remaining("g", 0) > 1.3 * few.remaining("g", 0)


def test_the_population_is_learned_from_those_that_are_still_running():
    """Log lengths are normal around 6; whoever is longer than exp(6) is still running, and known to be."""
    model, rng = LengthModel(10 ** 6), np.random.default_rng(0)
    for i, length in enumerate(np.exp(6 + 0.7 * rng.standard_normal(3000))):
        model.started(f"{i}", "0")
        model.reached(f"{i}", "0", int(min(length, exp(6))))
    rng = np.random.default_rng(0)
    for i, length in enumerate(np.exp(6 + 0.7 * rng.standard_normal(3000))):
        if length < exp(6):
            model.finished(f"{i}", "0", int(length))
    population = model._population
    assert population.mean == pytest.approx(6, abs=0.1) and sqrt(population.variance) == pytest.approx(0.7, abs=0.1)


def test_the_first_to_finish_is_not_mistaken_for_its_group():
    """One of eight ended at 50 tokens; that the others are at 400 says more."""
    alone, among = learned(50, 8, 0.8, 0.4), learned(50, 8, 0.8, 0.4)
    for model, others in ((alone, 0), (among, 7)):
        for i in range(1 + others):
            model.started("g", f"{i}")
        for i in range(1, 1 + others):
            model.reached("g", f"{i}", 400)
        model.finished("g", "0", 50)
    assert alone.remaining("g", 0) < 200 and among.remaining("g", 0) > 400


@settings(deadline=None)
@given(st.lists(st.integers(1, LIMIT), min_size=1, max_size=8), st.integers(0, LIMIT))
def test_remaining_lengths_are_within_the_limit(lengths, tokens):
    model = LengthModel(LIMIT)
    assert model.remaining("g", tokens) == LIMIT - tokens
    for i, length in enumerate(lengths):
        model.started("g", f"{i}")
        model.finished("g", f"{i}", length)
    assert 0 <= model.remaining("g", tokens) <= LIMIT - tokens


def test_one_ten_times_as_long_as_its_siblings_goes_on_for_long():
    model = learned(50, 8, 0.5, 0.3)
    for i in range(8):
        model.started("g", f"{i}")
    for i in range(7):
        model.finished("g", f"{i}", 100)
    assert model.remaining("g", 1000) >= 500


def test_an_earlier_epoch_counts_as_one_observation():
    model = LengthModel(10 ** 6, {"g": 100})
    assert model.known("g") and not model.known("h")
    other = LengthModel(10 ** 6)
    other.started("g", "0")
    other.finished("g", "0", 100)
    assert model.remaining("g", 0) == pytest.approx(other.remaining("g", 0))

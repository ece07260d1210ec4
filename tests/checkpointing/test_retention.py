"""Which checkpoints stay, as properties."""

from __future__ import annotations

import math

from hypothesis import given, strategies as st

from megatron_pbsd.checkpointing.retention import Candidate, best, reasons, unknown
from megatron_pbsd.config import BestConfig, CheckpointConfig

VALUES = st.one_of(st.none(), st.sampled_from([math.nan, math.inf]), st.integers(-3, 3).map(float))


@st.composite
def runs(draw):
    steps = draw(st.lists(st.integers(1, 60), unique=True, max_size=12))
    candidates = [Candidate(f"step_{step}", step, {} if (value := draw(VALUES)) is None else {"m": value})
                  for step in steps]
    asked = draw(st.sampled_from([None, {"metric": "m"}, {"metric": "m", "direction": "min"}]))
    policy = CheckpointConfig(keep=draw(st.integers(1, 4)), keep_every=draw(st.integers(0, 6)), best=asked)
    return candidates, policy


@given(runs())
def test_what_stays_is_what_the_keys_say(run):
    candidates, policy = run
    kept = {name for name, why in reasons(candidates, policy).items() if why}
    expected = {c.name for c in candidates[-policy.keep :]}
    expected |= {c.name for c in candidates if policy.keep_every and c.step % policy.keep_every == 0}
    if policy.best:
        values = [(c.metrics["m"], c.name) for c in candidates if math.isfinite(c.metrics.get("m", math.nan))]
        extreme = (max if policy.best.direction == "max" else min)((v for v, _ in values), default=None)
        expected |= {next(name for v, name in values if v == extreme)} if values else set()
    assert kept == expected


@given(runs())
def test_removing_as_they_come_keeps_what_removing_at_the_end_would(run):
    """Nothing that would be wanted later goes early: newest, multiples and the best of all are still there."""
    candidates, policy = run
    held = []
    for candidate in candidates:
        held.append(candidate)
        why = reasons(held, policy)
        held = [c for c in held if why[c.name]]
        assert candidate in held
    assert held == [c for c in candidates if reasons(candidates, policy)[c.name]]


def test_the_best_is_the_first_of_equals_and_only_among_measured_ones():
    policy = CheckpointConfig(best={"metric": "m"}).best
    candidates = [Candidate("step_1", 1, {"m": 0.5}), Candidate("step_2", 2, {"m": 0.5}), Candidate("step_3", 3, {})]
    assert best(candidates, policy).name == "step_1"
    assert best(candidates[2:], policy) is None


def test_a_metric_that_no_step_has_is_named_with_the_nearest():
    metrics = {"eval/exact_match": 0.1, "loss/total": 0.2}
    assert unknown(BestConfig(metric="loss/total"), metrics) is None
    assert "'eval/exact_mach' is no metric of this run; did you mean 'eval/exact_match'?" in unknown(
        BestConfig(metric="eval/exact_mach"), metrics)
    assert "it has eval/exact_match, loss/total" in unknown(BestConfig(metric="x"), metrics)

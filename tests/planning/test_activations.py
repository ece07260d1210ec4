"""Activations against the equations of Korthikanti et al., arXiv 2205.05198, and pipelines against their schedules."""

from __future__ import annotations

import pytest
from hypothesis import given, settings, strategies as st

from launcher.published_runs import gpt
from megatron_pbsd.planning.activations import Kernels, Shares, in_flight, kept

GPT = Kernels(flash=False, dropout=True)


@pytest.mark.parametrize(("hidden", "heads", "tp"), [(6144, 64, 8), (12288, 96, 8), (12288, 96, 4)])
def test_a_layer_of_a_gpt_keeps_what_the_equations_say(hidden, heads, tp):
    """Bytes of a position; s = 2048."""
    decoder, s = gpt(4, hidden, heads), 2048
    scores = 5 * heads * s / hidden

    def of(shares, recompute="none"):
        return sum(kept(decoder, False, shares, GPT, recompute, s).values()) / hidden

    assert of(Shares()) == pytest.approx(34 + scores)
    assert of(Shares(tp)) == pytest.approx(10 + 24 / tp + scores / tp)
    assert of(Shares(tp, sequence=True)) == pytest.approx((34 + scores) / tp)
    assert of(Shares(tp, sequence=True), "selective") == pytest.approx(34 / tp)
    assert of(Shares(tp), "full") == 2


@settings(max_examples=60, deadline=None)
@given(pp=st.integers(1, 8), vpp=st.integers(1, 4), rounds=st.integers(1, 4), data=st.data())
def test_passes_in_flight_are_those_of_the_schedule(pp, vpp, rounds, data):
    """Warm-up passes of Megatron-core's schedules, then one forward and one backward pass in turn."""
    stage, count = data.draw(st.integers(0, pp - 1)), rounds * pp
    vpp = vpp if pp > 1 else 1
    total = count * vpp
    warm = pp - stage - 1 if vpp == 1 else 2 * (pp - stage - 1) + (vpp - 1) * pp
    order = [1] * min(warm, total) + [1, -1] * max(total - warm, 0)
    most = running = 0
    for change in order:
        running += change
        most = max(most, running)
    assert in_flight(pp, stage, vpp, count) == most

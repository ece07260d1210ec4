"""The engine in closed form against one that goes step by step."""

import pytest
from hypothesis import given, settings, strategies as st
from simulation.step_by_step import Sequence, SteppedEngine

from megatron_pbsd.simulation.cost import CostModel
from megatron_pbsd.simulation.engine import Run, SimulatedEngine

COST = CostModel(step=0.03, per_token=1e-4, per_kv=2e-5, per_prefill=3e-4, per_pull=0.0, kv_tokens=120)


def closed_form(cost, slots, watermark, arrivals):
    engine = SimulatedEngine("e", cost, slots, watermark)
    finished = {}
    pending = sorted(arrivals, key=lambda a: a[0])
    while True:
        event = engine.next_event()
        if pending and (event is None or pending[0][0] <= event):
            time, s = pending.pop(0)
            engine.arrive(Run(s.name, s.context, s.missing, s.tokens), time)
        elif event is not None:
            for run in engine.finish_due():
                finished[run.request_id] = event
        else:
            return finished, engine


arrivals = st.lists(st.tuples(
    st.one_of(st.just(0.0), st.floats(0.0, 3.0)), st.integers(1, 30), st.integers(1, 60)), min_size=1, max_size=10)


@settings(max_examples=120, deadline=None)
@given(arrivals, st.integers(1, 5), st.integers(0, 12), st.integers(100, 400))
def test_closed_form_is_step_by_step(drawn, slots, watermark, kv_tokens):
    cost = CostModel(COST.step, COST.per_token, COST.per_kv, COST.per_prefill, 0.0, kv_tokens)
    made = [(time, Sequence(str(i), context, context, tokens)) for i, (time, context, tokens) in enumerate(drawn)]
    finished, engine = closed_form(cost, slots, watermark, made)
    wanted, preemptions = SteppedEngine(cost, slots, watermark).run(made)
    assert finished == pytest.approx(wanted, rel=1e-9)
    assert engine.counters.preemptions == preemptions
    assert engine.counters.peak_kv <= kv_tokens or len(drawn) == 1 or max(c + t for _, c, t in drawn) > kv_tokens
    assert engine.counters.generated_tokens == sum(tokens for _, _, tokens in drawn)


def test_the_series_of_steps_is_summed():
    cost, kv = COST, 50
    one_by_one = 0.0
    for _ in range(7):
        one_by_one += cost.seconds(1, 3, kv, 3)
        kv += 3
    assert cost.seconds(7, 3, 50, 3) == pytest.approx(one_by_one)

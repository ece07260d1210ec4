"""Whole simulated rollouts: small ones against hand calculation and step by step, and what holds of any."""

from dataclasses import replace

import pytest
from hypothesis import given, settings, strategies as st
from simulation.step_by_step import Sequence, SteppedEngine

from megatron_pbsd.errors import UsageError
from megatron_pbsd.rollout.policies.divided import Divided
from megatron_pbsd.rollout.policies.group_pinned import GroupPinned
from megatron_pbsd.simulation.bounds import bounds, kv_reads
from megatron_pbsd.simulation.cluster import Cluster, Failure, SimulationError
from megatron_pbsd.simulation.cost import CostModel, cost_model
from megatron_pbsd.simulation.experiment import POLICIES, run_experiment, simulate
from megatron_pbsd.simulation.speculation import ACCEPTED, LONGEST_DRAFT, Speculation
from megatron_pbsd.simulation.workload import Job, Workload, jobs

COST = CostModel(step=0.03, per_token=1e-4, per_kv=2e-5, per_prefill=3e-4, per_pull=1e-4, kv_tokens=150)


def job(name, tokens, prompt=5, tool_s=(), observation=0):
    return Job(name, name, prompt, (tokens,) if isinstance(tokens, int) else tokens, tool_s, observation)


def workload(**requests):
    return Workload.model_validate({
        "name": "small", "engines": 4, "chunk_tokens": 256, "seeds": 1,
        "model": {"parameters": 16e9, "active_parameters": 2e9, "weight_bytes": 2, "kv_bytes_per_token": 31104},
        "hardware": {"gpus": 1, "memory_bytes": 45e9}, "engine": {"overhead_s": 0.02, "slots": 32},
        "requests": {"groups": 40, "group_size": 8, "limit": 8192, "mean": 2000, "prompt": 100} | requests})


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 60)), min_size=1, max_size=8), st.integers(1, 3))
def test_pinned_groups_run_as_on_engines_of_their_own(drawn, engines):
    work = [job(f"{i}", tokens, prompt) for i, (prompt, tokens) in enumerate(drawn)]
    outcome = Cluster(COST, engines, 4, 100, GroupPinned()).run(work)
    for e in range(engines):
        mine = [(0.0, Sequence(j.request_id, j.prompt, j.prompt, j.tokens)) for j in work[e::engines]]
        finished, preemptions = SteppedEngine(COST, 4).run(mine)
        assert {r: outcome.finished[r] for r in finished} == pytest.approx(finished)
        assert outcome.engines[e].counters.preemptions == preemptions


def test_division_alone_changes_nothing_on_an_engine_with_room():
    """Chunk boundaries cost no time, and KV that stays is not computed again."""
    work = [job(f"{i}", 10 + 7 * i) for i in range(3)]
    cost = replace(COST, kv_tokens=1000)
    whole = Cluster(cost, 1, 4, 100, Divided(1000)).run(work)
    parts = Cluster(cost, 1, 4, 100, Divided(4)).run(work)
    assert parts.finished == pytest.approx(whole.finished)
    assert parts.decisions > whole.decisions and parts.moves == 0


def test_a_tool_call_takes_no_slot_and_keeps_its_kv():
    """Two turns of 10 tokens with 5 s between them, on an engine with one slot: another job runs meanwhile."""
    first = job("a", (10, 10), tool_s=(5.0,), observation=3)
    other = job("b", 20)
    outcome = Cluster(COST, 1, 1, 100, Divided(1000)).run([first, other])

    def seconds(steps, kv):
        return COST.seconds(steps, 1, kv, 1)

    turn = 5 * COST.per_prefill + seconds(10, 5)
    assert outcome.finished["b"] == pytest.approx(turn + 5 * COST.per_prefill + seconds(20, 5))
    assert outcome.finished["a"] == pytest.approx(turn + 5.0 + 3 * COST.per_prefill + seconds(10, 18))
    assert outcome.engines[0].counters.prefilled_tokens == 5 + 5 + 3


def test_what_a_lost_engine_had_is_done_again():
    work = [job(f"{i}", 40) for i in range(4)]
    undisturbed = Cluster(COST, 2, 2, 100, Divided(10)).run(work)
    outcome = Cluster(COST, 2, 2, 100, Divided(10)).run(work, [Failure(0, 0.6, back=1.0)])
    assert sorted(outcome.finished) == sorted(undisturbed.finished)
    assert outcome.lost_chunks == 2 and outcome.total_s > undisturbed.total_s
    generated = sum(engine.counters.generated_tokens for engine in outcome.engines)
    assert 160 < generated <= 160 + 2 * 10, "finished chunks are not generated again"
    with pytest.raises(SimulationError, match="4 of 4 requests are unfinished"):
        Cluster(COST, 1, 2, 100, Divided(10)).run(work, [Failure(0, 0.1)])


@pytest.mark.parametrize("name", [
    *POLICIES, "longest_remaining+history", "longest_remaining+correlation", "longest_remaining+speculation"])
def test_every_policy_finishes_everything_within_memory_and_the_same_each_time(name):
    small = workload(groups=12)
    asked, cost = jobs(small.requests, 0), cost_model(small)
    outcome = simulate(small, name, asked, 0)
    assert sorted(outcome.finished) == sorted(j.request_id for j in asked)
    assert simulate(small, name, asked, 0).finished == outcome.finished
    slack = small.engine.slots * LONGEST_DRAFT if "speculation" in name else 0
    assert all(engine.counters.peak_kv <= cost.kv_tokens + slack for engine in outcome.engines)
    divides = name not in ("group_pinned", "least_loaded")
    assert not divides or sum(engine.counters.preemptions for engine in outcome.engines) == 0


def test_lengths_are_as_the_workload_says():
    facts = workload(groups=500).requests
    asked = jobs(facts, 3)
    lengths = [j.tokens for j in asked]
    assert sum(lengths) / len(lengths) == pytest.approx(facts.mean, rel=1e-3)
    assert max(lengths) <= facts.limit and asked == jobs(facts, 3) != jobs(facts, 4)
    same = jobs(facts.model_copy(update={"correlation": 1.0}), 3)
    assert all(len({j.tokens for j in same[g * 8:g * 8 + 8]}) == 1 for g in range(500))
    again = jobs(facts, 3, epoch=1)
    assert [j.prompt for j in again] == [j.prompt for j in asked] and again != asked


def test_one_member_of_each_group_may_be_far_longer():
    facts = workload(correlation=1.0, outlier=10.0, limit=10 ** 6).requests
    for g in range(0, 320, 8):
        *others, longest = sorted(j.tokens for j in jobs(facts, 0)[g:g + 8])
        assert len(set(others)) == 1 and longest / others[0] == pytest.approx(10, rel=0.05)


def test_turns_share_a_trajectorys_tokens():
    facts = workload(turns=3, tool_s=1.0, observation=7).requests
    for one in jobs(facts, 0):
        assert len(one.turns) == len(one.tool_s) + 1 or one.tokens < 3
        assert max(one.turns) - min(one.turns) <= 1


def test_bounds_of_one_request_are_its_time():
    one = job("a", (10, 10), tool_s=(5.0,), observation=3)
    assert kv_reads(one) == sum(range(5, 15)) + sum(range(18, 28))
    alone = Cluster(COST, 1, 1, 100, Divided(1000)).run([one])
    prefill = alone.engines[0].counters.prefilled_tokens * COST.per_prefill
    assert bounds([one], COST, 1, 1)["longest_request"] == pytest.approx(alone.total_s - prefill)


def test_drafts_yield_what_was_measured_and_stop_where_they_do_not_pay():
    for siblings, accepted in ACCEPTED:
        assert Speculation.tokens_per_step(siblings, LONGEST_DRAFT) == pytest.approx(accepted)
    assert Speculation.tokens_per_step(3, 0) == 1
    free, dear = replace(COST, per_token=0.0), replace(COST, per_token=1.0)
    assert Speculation().best_draft(free, [0, 5], 10) == LONGEST_DRAFT
    assert Speculation().best_draft(dear, [0, 5], 10) == 0


def test_a_policy_that_does_not_exist_is_named():
    with pytest.raises(UsageError, match="policies = 'contextaware'.*did you mean 'context_aware'"):
        run_experiment(workload().model_copy(update={"policies": ("contextaware",)}))


def test_results_compare_with_the_baseline():
    results = run_experiment(workload(groups=16).model_copy(update={"policies": ("divided", "oracle")})).results()
    rows = results["policies"]
    assert list(rows) == ["group_pinned", "divided", "oracle"]
    base = rows["group_pinned"]
    assert base["throughput_rel"] == 1 and base["gap_closed"] == 0 and rows["oracle"]["gap_closed"] == 1
    assert rows["divided"]["throughput_rel"] == pytest.approx(base["total_s"] / rows["divided"]["total_s"])
    assert all(row["total_s"] >= max(results["bounds"].values()) for row in rows.values())
    assert all(0 <= row["idle"] < 1 and 0 < row["tail_s"] < row["total_s"] for row in rows.values())

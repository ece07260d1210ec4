"""Plans lose, double and split nothing, keep the budget, and balance cost at least as well as the usual ways."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from launcher.bench.balance import first_fit_decreasing, karmarkar_karp, reasoning
from megatron_pbsd.learner.balance import exact, measure, plan
from megatron_pbsd.learner.cost import Cost
from megatron_pbsd.learner.errors import LearnerError

COSTS = st.sampled_from([Cost(1.0, 0.0), Cost(1.0, 0.05), Cost(0.0, 1.0)])
# Attention costs as much as everything else at 16384 positions.
LONG_CONTEXT = Cost(16384.0, 1.0)
LENGTHS = st.lists(st.integers(0, 60), min_size=1, max_size=40)


def width(length, multiple):
    return max(multiple, (length + multiple - 1) // multiple * multiple)


@settings(deadline=None)
@given(lengths=LENGTHS, ranks=st.integers(1, 5), extra=st.integers(0, 150), cost=COSTS,
       multiple=st.sampled_from([1, 2, 4]), count_multiple=st.integers(1, 3), padded=st.booleans(),
       synchronised=st.booleans())
def test_a_plan_is_a_partition_within_budget(
        lengths, ranks, extra, cost, multiple, count_multiple, padded, synchronised):
    budget = width(max(lengths), multiple) + extra
    made = plan(lengths, ranks, budget, cost, multiple=multiple, micro_batch_multiple=count_multiple, padded=padded,
                synchronised=synchronised)
    assert sorted(i for rank in made.micro_batches for part in rank for i in part) == list(range(len(lengths)))
    assert len(made.micro_batches) == ranks
    counts = {len(rank) for rank in made.micro_batches}
    assert len(counts) == 1 and counts.pop() % count_multiple == 0

    alone = [width(length, multiple) for length in lengths]
    table = []
    for r, rank in enumerate(made.micro_batches):
        table.append([])
        for j, part in enumerate(rank):
            rows = [max((alone[i] for i in part), default=0)] * len(part) if padded else [alone[i] for i in part]
            assert sum(rows) <= budget and sum(rows) == made.positions[r, j]
            table[-1].append(sum(cost.linear * row + cost.quadratic * row**2 for row in rows))
    assert made.costs == pytest.approx(np.array(table))
    assert made.makespan == pytest.approx(max(map(sum, table)))
    assert made.synchronised_makespan == pytest.approx(sum(map(max, zip(*table, strict=True))))
    assert made.padding_waste == pytest.approx(1 - sum(lengths) / made.positions.sum())
    assert made.bound <= made.makespan * (1 + 1e-9) <= made.synchronised_makespan * (1 + 1e-8)
    each = [cost(float(w)) for w in alone]
    assert made.bound == pytest.approx(max(sum(each) / ranks, max(each)))


@settings(deadline=None)
@given(lengths=LENGTHS, ranks=st.integers(1, 4), cost=COSTS, padded=st.booleans(), synchronised=st.booleans(),
       multiple=st.sampled_from([1, 4]), seed=st.integers(0, 99))
def test_the_order_of_sequences_does_not_matter(lengths, ranks, cost, padded, synchronised, multiple, seed):
    def content(lengths):
        made = plan(lengths, ranks, 100, cost, multiple=multiple, padded=padded, synchronised=synchronised)
        return [[sorted(lengths[i] for i in part) for part in rank] for rank in made.micro_batches]

    assert content(lengths) == content(lengths) == content(np.random.default_rng(seed).permutation(lengths).tolist())


@settings(deadline=None, max_examples=300)
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=30), ranks=st.integers(1, 5),
       extra=st.integers(0, 150), cost=COSTS, padded=st.booleans())
def test_never_worse_than_karmarkar_karp_or_first_fit_on_tokens(lengths, ranks, extra, cost, padded):
    lengths, budget = np.sort(lengths)[::-1], max(lengths) + extra
    ours = plan(lengths, ranks, budget, cost, padded=padded)
    for method in (karmarkar_karp, first_fit_decreasing):
        theirs = method(lengths, ranks, budget, padded)
        assert sorted(i for rank in theirs for part in rank for i in part) == list(range(len(lengths)))
        theirs = measure(theirs, lengths, cost, padded=padded)
        assert theirs.positions.max() <= budget
        assert ours.makespan <= theirs.makespan * (1 + 1e-9)


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=7), ranks=st.integers(2, 3), cost=COSTS)
def test_small_batches_are_near_the_optimum(lengths, ranks, cost):
    each = [cost(float(length)) for length in lengths]
    optimum = min(max(sum(c for c, r in zip(each, choice, strict=True) if r == rank) for rank in range(ranks))
                  for choice in product(range(ranks), repeat=len(lengths)))
    made = plan(lengths, ranks, 100, cost)
    assert optimum <= made.makespan * (1 + 1e-9)
    assert made.makespan <= (4 / 3 - 1 / (3 * ranks)) * optimum * (1 + 1e-9)


@settings(deadline=None)
@given(lengths=LENGTHS, ranks=st.integers(1, 4), extra=st.integers(0, 100), cost=COSTS)
def test_the_other_objective_is_minimised_when_ranks_wait_for_each_other(lengths, ranks, extra, cost):
    budget = max([1, *lengths]) + extra
    free = plan(lengths, ranks, budget, cost)
    waiting = plan(lengths, ranks, budget, cost, synchronised=True)
    assert waiting.synchronised_makespan <= free.synchronised_makespan * (1 + 1e-9)


@pytest.mark.parametrize("padded, slack", [(False, 1.0003), (True, 1.03)])
def test_long_tails_are_balanced_almost_to_the_bound(padded, slack):
    lengths = reasoning(np.random.default_rng(0), 16 * 16).tolist()
    free = plan(lengths, 16, 32768, LONG_CONTEXT, padded=padded)
    waiting = plan(lengths, 16, 32768, LONG_CONTEXT, padded=padded, synchronised=True)
    assert free.makespan <= slack * free.bound and free.padding_waste <= 0.02
    assert free.makespan < waiting.makespan
    assert waiting.synchronised_makespan < 0.97 * free.synchronised_makespan
    if padded:  # rectangles in order of cost: no arrangement of them waits less
        assert (waiting.costs[:, :-1].min(axis=0) >= waiting.costs[:, 1:].max(axis=0)).all()


def least_synchronised_makespan(lengths, budget, cost):
    """Of two ranks with two micro-batches each, by trying everything."""
    choices = np.array(list(product(range(4), repeat=len(lengths))))[:, :, None] == np.arange(4)
    positions, costs = (choices * lengths[:, None]).sum(axis=1), (choices * cost(lengths)[:, None]).sum(axis=1)
    steps = costs.reshape(-1, 2, 2).max(axis=2).sum(axis=1)
    return steps[(positions <= budget).all(axis=1)].min()


@pytest.mark.parametrize("synchronised, mean, most", [(False, 1.05, 1.2), (True, 1.015, 1.1)])
def test_micro_batches_are_aligned_nearly_as_well_as_can_be(synchronised, mean, most):
    ratios, cost = [], Cost(50.0, 1.0)
    for seed in range(40):
        lengths = np.clip(np.random.default_rng(seed).lognormal(3, 0.8, 7), 2, 100).astype(int)
        budget = max(int(lengths.max()), int(lengths.sum() / 2.6))
        made = plan(lengths.tolist(), 2, budget, cost, synchronised=synchronised)
        if made.costs.shape[1] == 2:
            ratios.append(made.synchronised_makespan / least_synchronised_makespan(lengths.astype(float), budget, cost))
    assert len(ratios) > 30 and min(ratios) >= 1 - 1e-9
    assert np.mean(ratios) <= mean and max(ratios) <= most


@given(lengths=st.lists(st.integers(1, 10**6), min_size=1, max_size=50), seed=st.integers(0, 99))
def test_sums_of_exact_costs_do_not_depend_on_their_order(lengths, seed):
    costs = Cost(1.8e10, 1.2e6 / 7)(np.array(lengths, dtype=float))
    whole = exact(costs)
    assert whole / whole.max() == pytest.approx(costs / costs.max(), rel=1e-6, abs=1e-12)
    # Up to as many rows as there are sequences, each padded to the longest.
    rows = np.random.default_rng(seed).choice([*whole, whole.max()], len(lengths))
    assert float(np.add.accumulate(rows)[-1]) == float(np.add.accumulate(rows[::-1])[-1]) == sum(map(int, rows))


def test_ranks_are_balanced_by_cost_not_by_tokens():
    # Quadratic: 4 positions cost as much as 16 single ones, of which tokens alone would give the rank six more.
    made = plan([4] + [1] * 16, 2, 32, Cost(0.0, 1.0))
    assert sorted(made.rank_costs) == [16.0, 16.0]


def test_long_sequences_share_an_index():
    # Two long ones, six short ones: waiting for one long micro-batch rather than two.
    made = plan([10, 10, 2, 2, 2, 2, 2, 2], 2, 10, Cost(1.0, 1.0))
    assert sorted(made.costs.tolist()) == [[110.0, 18.0], [110.0, 18.0]]


def test_padded_neighbours_in_length_share_a_rectangle():
    made = plan([8, 1, 8, 1, 8, 1, 8, 1], 2, 16, Cost(1.0, 0.0), padded=True)
    assert made.padding_waste == 0 and made.costs.shape == (2, 2)
    assert made.makespan == made.bound == 18


def test_micro_batches_are_few():
    assert plan([50] * 8, 2, 100, Cost(1.0, 0.0)).costs.shape == (2, 2)
    assert plan([50] * 8, 2, 100, Cost(1.0, 0.0), padded=True).costs.shape == (2, 2)


def test_fewer_sequences_than_ranks_leave_micro_batches_empty():
    made = plan([5], 3, 8, Cost(1.0, 0.0), micro_batch_multiple=2)
    assert sorted(part for rank in made.micro_batches for part in rank) == [[], [], [], [], [], [0]]


def test_an_empty_batch_is_an_error():
    with pytest.raises(LearnerError, match="without sequences"):
        plan([], 2, 8, Cost(1.0, 0.0))


def test_a_sequence_beyond_the_budget_is_an_error_that_names_the_key():
    message = (r"learner.micro_batch_tokens \* learner.parallel.cp = 10 is less than the 12 positions of the longest "
               r"sequence \(9, padded to a multiple of 4\); it must be at least 12")
    with pytest.raises(LearnerError, match=message):
        plan([9, 3], 1, 10, Cost(1.0, 0.0), multiple=4)
    plan([9, 3], 1, 12, Cost(1.0, 0.0), multiple=4)

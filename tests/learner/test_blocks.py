"""Plans with blocks lose, double and split nothing, keep the budget, cannot deadlock, and balance cost."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from megatron_pbsd.learner.blocks import plan_blocks
from megatron_pbsd.learner.cost import Cost
from megatron_pbsd.learner.errors import LearnerError
from megatron_pbsd.learner.microbatch import Shape, places

COSTS = st.sampled_from([Cost(1.0, 0.0), Cost(1.0, 0.05), Cost(0.0, 1.0)])
RANKS = st.sampled_from([1, 2, 4, 8])
TENSOR_PARALLEL = st.sampled_from([1, 2, 3])


def held(lengths, size, multiple):
    """Positions that each of `size` ranks holds of these sequences in one micro-batch."""
    return places([max(n, 1) for n in lengths], Shape(packed=True, cp=size, multiple=multiple), 0)[0].size


def least_ranks(length, ranks, tokens, multiple):
    return next((size for size in (1, 2, 4, 8) if size <= ranks and held([length], size, multiple) <= tokens), None)


@st.composite
def batches(draw):
    """Lengths that fit in some way, ranks, budget, positions of a row are a multiple of."""
    ranks, multiple = draw(RANKS), draw(TENSOR_PARALLEL)
    tokens = draw(st.integers(2 * multiple, 40))
    lengths = draw(st.lists(st.integers(0, ranks * tokens), min_size=1, max_size=40))
    lengths = [n for n in lengths if least_ranks(n, ranks, tokens, multiple)]
    return lengths or [1], ranks, tokens, multiple


@settings(deadline=None, max_examples=200)
@given(given_batch=batches(), cost=COSTS)
def test_blocks_are_aligned_and_hold_every_sequence_once_within_the_budget(given_batch, cost):
    lengths, ranks, tokens, multiple = given_batch
    shares = plan_blocks(lengths, ranks, tokens, cost, Shape(packed=True, multiple=multiple)).shares
    assert len(shares) == ranks and len({len(rank) for rank in shares}) == 1
    found = []
    for column in zip(*shares, strict=True):
        rank = 0
        while rank < ranks:
            share = column[rank]
            assert rank % share.size == 0
            # Every rank of the block has it at this index, so that none waits for one that is elsewhere.
            assert column[rank : rank + share.size] == (share,) * share.size
            assert held([lengths[i] for i in share.sequences], share.size, multiple) <= tokens
            assert list(share.sequences) == sorted(share.sequences)
            # Two that need more than half of the block each cannot be in it together.
            assert share.size == 1 or len(share.sequences) == 1
            found += share.sequences
            for i in share.sequences:
                assert share.size == least_ranks(lengths[i], ranks, tokens, multiple)
            rank += share.size
    assert sorted(found) == list(range(len(lengths)))


@settings(deadline=None)
@given(given_batch=batches(), cost=COSTS)
def test_the_makespan_is_that_of_ranks_that_wait_for_their_block_and_near_the_mean(given_batch, cost):
    lengths, ranks, tokens, multiple = given_batch
    plan = plan_blocks(lengths, ranks, tokens, cost, Shape(packed=True, multiple=multiple))

    def each(share):
        granule = 2 * share.size if share.size > 1 else 1
        return [cost(float(-(-max(lengths[i], 1) // granule) * granule)) / share.size for i in share.sequences]

    clock = [0.0] * ranks
    for column in zip(*plan.shares, strict=True):
        started = list(clock)
        for rank, share in enumerate(column):
            first = rank - rank % share.size
            clock[rank] = max(started[first : first + share.size]) + sum(each(share))
    assert plan.makespan == pytest.approx(max(clock))
    assert plan.costs == pytest.approx(np.array(clock))
    alone = [c for rank in plan.shares for share in rank for c in each(share)]
    assert plan.makespan <= (sum(alone) / ranks + max(alone)) * (1 + 1e-9)


@settings(deadline=None)
@given(given_batch=batches(), cost=COSTS, seed=st.integers(0, 99))
def test_the_order_of_sequences_does_not_matter(given_batch, cost, seed):
    lengths, ranks, tokens, multiple = given_batch

    def content(lengths):
        made = plan_blocks(lengths, ranks, tokens, cost, Shape(packed=True, multiple=multiple))
        return [[(share.size, sorted(lengths[i] for i in share.sequences)) for share in rank] for rank in made.shares]

    assert content(lengths) == content(np.random.default_rng(seed).permutation(lengths).tolist())


@settings(deadline=None)
@given(length=st.integers(1, 400), ranks=RANKS, tokens=st.integers(1, 40), multiple=TENSOR_PARALLEL)
def test_a_sequence_too_long_for_all_ranks_is_an_error_with_the_least_budget(length, ranks, tokens, multiple):
    shape = Shape(packed=True, multiple=multiple)
    if least_ranks(length, ranks, tokens, multiple):
        plan_blocks([1, length], ranks, tokens, Cost(1.0, 0.0), shape)
        return
    with pytest.raises(LearnerError, match=rf"learner.micro_batch_tokens = {tokens} .* at least (\d+)") as caught:
        plan_blocks([1, length], ranks, tokens, Cost(1.0, 0.0), shape)
    least = int(str(caught.value).rsplit(" ", 1)[1])
    plan_blocks([length], ranks, least, Cost(1.0, 0.0), shape)
    with pytest.raises(LearnerError):
        plan_blocks([length], ranks, least - 1, Cost(1.0, 0.0), shape)


def test_an_empty_batch_is_an_error():
    with pytest.raises(LearnerError, match="without sequences"):
        plan_blocks([], 2, 8, Cost(1.0, 0.0), Shape(packed=True))


def test_wide_blocks_come_first_and_short_sequences_level_the_ranks():
    # 32 takes four ranks and 16 two of them; each of the other two has 8 positions left to catch up.
    made = plan_blocks([4, 32, 16, 4, 4, 4], 4, 8, Cost(1.0, 0.0), Shape(packed=True))
    sizes = [[share.size for share in rank] for rank in made.shares]
    assert sizes == [[4, 2], [4, 2], [4, 1], [4, 1]]
    assert made.costs.tolist() == [16.0] * 4

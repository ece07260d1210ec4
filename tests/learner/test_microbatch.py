"""Micro-batching loses, doubles and moves nothing, and keeps its budget."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from megatron_pbsd.batch import Batch
from megatron_pbsd.learner.errors import LearnerError
from megatron_pbsd.learner.microbatch import deal, micro_batches

lengths = st.lists(st.integers(1, 40), min_size=1, max_size=30)


@given(lengths=lengths, ranks=st.integers(1, 4), budget=st.integers(40, 200), multiple=st.sampled_from([1, 2, 4]))
def test_deal_is_a_partition_with_equal_counts_within_budget(lengths, ranks, budget, multiple):
    dealt = deal(lengths, ranks, budget, multiple)
    assert sorted(i for rank in dealt for part in rank for i in part) == list(range(len(lengths)))
    assert len({len(rank) for rank in dealt}) == 1
    for part in (part for rank in dealt for part in rank if part):
        width = max(-(-max(lengths[i] - 1, 1) // multiple) * multiple for i in part)
        assert width * len(part) <= budget
    sizes = [sum(map(len, rank)) for rank in dealt]
    assert max(sizes) - min(sizes) <= 1


@settings(deadline=None)
@given(lengths=lengths, ranks=st.integers(1, 3), masked=st.booleans(), multiple=st.sampled_from([1, 2]),
       seed=st.integers(0, 9))
def test_every_prediction_appears_once_with_its_own_fields(lengths, ranks, masked, multiple, seed):
    rng = np.random.default_rng(seed)
    tokens = [rng.integers(0, 1000, n) for n in lengths]
    columns = {"tokens": tokens, "advantages": [rng.normal(size=n) for n in lengths]}
    if masked:
        columns["loss_mask"] = [(rng.random(n) < 0.5).astype(np.float32) for n in lengths]
    batch = Batch(columns)
    seen = []
    for rank in range(ranks):
        for micro in micro_batches(batch, rank, ranks, 60, ["advantages"], multiple):
            assert micro.inputs.shape[1] % multiple == 0
            rows = len(micro.inputs)
            for k in range(len(micro.selected)):
                position, row = divmod(micro.selected[k], rows)
                i, t = micro.sequences[k], micro.positions[k]
                assert t == position + 1
                assert (micro.inputs[row, : position + 1] == tokens[i][:t]).all()
                assert micro.targets[k] == tokens[i][t]
                assert micro.fields["advantages"][k] == batch["advantages"][i][t]
                seen.append((i, t))
    wanted = [(i, t) for i, n in enumerate(lengths) for t in range(1, n)
              if not masked or batch["loss_mask"][i][t]]
    assert sorted(seen) == wanted


def test_a_sequence_beyond_the_budget_is_an_error_that_names_the_key():
    with pytest.raises(LearnerError, match="learner.micro_batch_tokens = 8 .* at least 9"):
        deal([10, 3], 1, 8)


def test_an_empty_batch_is_an_error():
    with pytest.raises(LearnerError, match="without sequences"):
        deal([], 2, 8)

"""A micro-batch loses, doubles and moves nothing, whoever holds its parts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from megatron_pbsd.batch import Batch
from megatron_pbsd.learner.fields import per_token
from megatron_pbsd.learner.microbatch import Shape, build, places

lengths = st.lists(st.integers(1, 40), min_size=0, max_size=8)
shapes = st.builds(Shape, packed=st.booleans(), cp=st.sampled_from([1, 2, 3, 4]), multiple=st.sampled_from([1, 2, 3]))


def make_batch(lengths, masked, seed):
    rng = np.random.default_rng(seed)
    columns = {
        "tokens": [rng.integers(1, 1000, n) for n in lengths],
        "advantages": [rng.normal(size=n) for n in lengths],
        "routed_experts": [rng.integers(0, 64, (n, 3, 2)) for n in lengths],
    }
    if masked:
        columns["loss_mask"] = [(rng.random(n) < 0.5).astype(np.float32) for n in lengths]
    return Batch(columns)


@settings(max_examples=150)
@given(lengths=lengths, shape=shapes)
def test_each_position_is_held_once_and_chunks_are_contiguous(lengths, shape):
    held, widths = [], set()
    for rank in range(shape.cp):
        sequence, position, bounds = places(lengths, shape, rank)
        assert sequence.shape == position.shape
        widths.add(sequence.shape)
        assert sequence.shape[1] % shape.multiple == 0 and sequence.shape[1] > 0
        for i, n in enumerate(lengths):
            mine = position[sequence == i]
            held += [(i, p) for p in mine if p < n]
            # Two chunks of equal size, the r-th and the r-th from the end: nothing reads what comes later in its chunk.
            first, second = np.split(mine, 2) if shape.cp > 1 else (mine, mine)
            assert (np.diff(first) == 1).all() and (np.diff(second) == 1).all()
            if shape.cp > 1:
                size, total = len(first), len(mine) * shape.cp
                assert first[0] == rank * size and second[0] == total - (rank + 1) * size
        if shape.packed:
            assert len(sequence) == 1 and bounds[-1] == sequence.size * shape.cp
            assert (np.diff(bounds) % shape.granule == 0).all()
            runs = sequence[0][np.flatnonzero(np.diff(sequence[0], prepend=-2))]
            assert list(runs) == list(range(len(lengths))) + [-1] * (len(runs) - len(lengths))
        else:
            assert bounds is None
    assert sorted(held) == [(i, p) for i, n in enumerate(lengths) for p in range(n)]
    assert len(widths) == 1


@settings(max_examples=60)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=8), shape=shapes, masked=st.booleans(),
       seed=st.integers(0, 9), data=st.data())
def test_every_prediction_appears_once_with_its_own_fields(lengths, shape, masked, seed, data):
    batch = make_batch(lengths, masked, seed)
    chosen = data.draw(st.permutations(range(len(lengths)))).copy()[: data.draw(st.integers(0, len(lengths)))]
    seen = []
    for rank in range(shape.cp):
        micro = build(batch, chosen, {"advantages": batch["advantages"]}, shape, rank, experts=True)
        rows = len(micro.inputs)
        for k, (i, t) in enumerate(zip(micro.rows, micro.columns, strict=True)):
            s, b = divmod(micro.selected[k], rows)
            assert micro.inputs[b, s] == batch["tokens"][i][t - 1] and not micro.padding[b, s]
            assert micro.targets[k] == batch["tokens"][i][t]
            assert micro.fields["advantages"][k] == batch["advantages"][i][t]
            assert (micro.experts[s, b] == batch["routed_experts"][i][t - 1]).all()
            assert micro.sequences[micro.sequence[k]] == i
            seen.append((i, t))
        assert (micro.experts.swapaxes(0, 1)[micro.padding] == -1).all()
    wanted = [(i, t) for i in sorted(chosen) for t in range(1, lengths[i])
              if not masked or batch["loss_mask"][i][t]]
    assert sorted(seen) == wanted
    assert micro.trained == len(wanted)


def test_packed_sequences_need_no_padding_without_context_parallelism():
    micro = build(make_batch([9, 5, 17], False, 0), [0, 1, 2], {}, Shape(packed=True))
    assert micro.inputs.shape == (1, 8 + 4 + 16) and not micro.padding.any()
    assert list(micro.bounds) == [0, 8, 12, 28]


def test_fields_of_turns_and_trajectories_reach_their_tokens():
    batch = Batch({"tokens": [np.arange(4), np.arange(2)], "turn_index": [np.array([-1, 0, 0, 1]), np.array([-1, 0])],
                   "reward": [0.5, -1.0]})
    columns = per_token(batch, ["reward", "turn_index"])
    assert [list(c) for c in columns["reward"]] == [[0.5] * 4, [-1.0] * 2]
    assert [list(c) for c in columns["turn_index"]] == [[-1, 0, 0, 1], [-1, 0]]


@pytest.mark.parametrize("packed", [True, False])
def test_an_empty_micro_batch_is_padding(packed):
    micro = build(make_batch([3], False, 0), [], {"advantages": [np.zeros(3)]}, Shape(packed, cp=2, multiple=2))
    assert micro.padding.all() and micro.trained == 0 and len(micro.selected) == 0
    assert micro.inputs.size % 2 == 0

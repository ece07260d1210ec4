"""Reductions against double loops over turns, sequences and groups."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given, strategies as st

from megatron_pbsd import losses
from megatron_pbsd.batch import Batch
from megatron_pbsd.config import PolicyLossConfig, SFTLossConfig
from megatron_pbsd.losses import Constant, LossError, token_weights

REDUCTIONS = ["token", "turn", "trajectory", "group", Constant(7)]


@st.composite
def batches(draw):
    """A batch and a loss of each of its tokens."""
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=7))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    columns = {
        "tokens": [rng.integers(0, 9, n) for n in lengths],
        "loss_mask": [rng.random(n) < 0.6 for n in lengths],
        "turn_index": [np.sort(rng.integers(0, 3, n)) for n in lengths],
        "group": [np.int64(rng.integers(0, 3)) for _ in lengths],
    }
    return Batch(columns), [rng.normal(size=n) for n in lengths]


def mean(values):
    return sum(values) / len(values)


def brute_force(batch, token_loss, reduction) -> float:
    """The loss as its definition reads. Position 0 is never predicted."""
    trained = {(i, t): token_loss[i][t] for i in range(batch.size) for t in range(1, batch.lengths[i])
               if batch["loss_mask"][i][t] > 0}
    if not trained:
        return 0.0
    if isinstance(reduction, Constant):
        return sum(trained.values()) / (batch.size * reduction.tokens)
    bins: dict = {}
    for (i, t), value in trained.items():
        key = {"token": None, "turn": (i, int(batch["turn_index"][i][t])), "trajectory": i,
               "group": int(batch["group"][i])}[reduction]
        bins.setdefault(key, []).append(value)
    return mean([mean(values) for values in bins.values()])


def weighted(weights, token_loss, count) -> float:
    return sum(float(w @ values) for w, values in zip(weights, token_loss, strict=True)) / max(count, 1)


@pytest.mark.parametrize("reduction", REDUCTIONS, ids=str)
@given(made=batches(), data=st.data())
def test_weights_give_the_loss_of_the_definition_however_sequences_are_divided(reduction, made, data):
    batch, token_loss = made
    weights = token_weights(batch, reduction)
    count = sum(int((mask[1:] > 0).sum()) for mask in batch["loss_mask"])
    expected = brute_force(batch, token_loss, reduction)
    assert weighted(weights, token_loss, count) == pytest.approx(expected, abs=1e-5)

    rank = data.draw(st.lists(st.integers(0, 2), min_size=batch.size, max_size=batch.size))
    shares = [weighted([w for w, r in zip(weights, rank) if r == k], [v for v, r in zip(token_loss, rank) if r == k],
                       count) for k in range(3)]
    assert sum(shares) == pytest.approx(expected, abs=1e-5)

    for values, mask in zip(weights, batch["loss_mask"], strict=True):
        assert values.dtype == np.float32 and values.shape == mask.shape
        assert not values[0] and not values[mask == 0].any() and (values[1:][mask[1:] > 0] > 0).all()


def test_a_reduction_without_its_field_says_so():
    batch = Batch({"tokens": [np.arange(3)], "loss_mask": [np.ones(3)]})
    for reduction, field in (("turn", "turn_index"), ("group", "group")):
        with pytest.raises(LossError, match=f"'{reduction}' needs the batch field '{field}'"):
            token_weights(batch, reduction)


def test_where_the_constant_comes_from():
    configured = PolicyLossConfig(reduction="constant", reduction_constant=64)
    assert losses.build(configured, generation_limit=9).reduction == Constant(64)
    default = losses.build(SFTLossConfig(reduction="constant"), generation_limit=9)
    assert pickle.loads(pickle.dumps(default)).reduction == Constant(9)
    assert losses.build(PolicyLossConfig(reduction="group"), generation_limit=9).reduction == "group"
    with pytest.raises(LossError, match="needs loss.reduction_constant"):
        losses.build(PolicyLossConfig(reduction="constant"))

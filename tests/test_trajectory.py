from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra.numpy import arrays

from megatron_pbsd.trajectory import Trajectory, Turn, VersionSpan

TURNS = (
    Turn((5, 6), (-0.5, -1.5), (7,), "search", "stop", (VersionSpan(1, 0, 2),)),
    Turn((8,), (-0.25,), (), "answer", "length", (VersionSpan(1, 0, 1),), (0, 1)),
)
DENSE = Trajectory("1/g/0", "g", "t", (1, 2, 3), (1, 2, 3, 4), TURNS, 1.0, {"f1": 0.5}, (0.1, 0.2), (1.0, 2.0))
TOKENS = 7


def experts(*shape: int, value: int = 1) -> np.ndarray:
    return np.full(shape, value, np.int16)


def through_json(trajectory: Trajectory) -> Trajectory:
    return Trajectory.from_json(json.loads(json.dumps(trajectory.to_json())))


@given(st.data(), st.integers(1, 3), st.integers(1, 4), st.sampled_from([0, 127, 128, 511, 32767]))
def test_routed_experts_through_json(data, layers, top_k, largest):
    values = data.draw(arrays(np.int16, (TOKENS, layers, top_k), elements=st.integers(-1, largest)))
    trajectory = replace(DENSE, routed_experts=values)
    copy = through_json(trajectory)
    np.testing.assert_array_equal(copy.routed_experts, values)
    assert copy.routed_experts.dtype == np.int16 and copy == trajectory


def test_one_byte_an_expert_where_that_is_enough():
    def size(value: int) -> int:
        return len(json.dumps(replace(DENSE, routed_experts=experts(TOKENS, 48, 8, value=value)).to_json()))

    plain = len(json.dumps(DENSE.to_json()))
    assert size(127) - plain < 1.4 * TOKENS * 48 * 8 < size(128) - plain < 2.8 * TOKENS * 48 * 8


def test_a_dense_trajectory_has_no_trace_of_experts():
    assert "routed_experts" not in DENSE.to_json()
    assert through_json(DENSE) == DENSE and through_json(DENSE).routed_experts is None


def test_equality_sees_every_field():
    routed = replace(DENSE, routed_experts=experts(TOKENS, 2, 2))
    assert routed == replace(DENSE, routed_experts=experts(TOKENS, 2, 2))
    others = [DENSE, replace(routed, reward=0.0), replace(routed, turns=TURNS[:1], routed_experts=experts(6, 2, 2)),
              replace(DENSE, routed_experts=experts(TOKENS, 2, 2, value=2)),
              replace(DENSE, routed_experts=experts(TOKENS, 1, 2))]
    assert all(routed != other and other != routed for other in others)
    assert routed != "1/g/0"


@pytest.mark.parametrize("wrong", [
    experts(TOKENS - 1, 2, 2), experts(TOKENS, 2), experts(TOKENS, 2, 2).astype(np.int64)], ids=np.shape)
def test_experts_fit_the_tokens(wrong):
    with pytest.raises(ValueError, match=r"routed experts of '1/g/0' are int.*expected int16\[7, MoE layers, top-k\]"):
        replace(DENSE, routed_experts=wrong)

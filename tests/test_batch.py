from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from megatron_pbsd.batch import SchemaError, from_trajectories
from megatron_pbsd.trajectory import Trajectory, Turn, VersionSpan


def trajectory(name: str, prompt: int, privileged: int, turns: list[tuple[int, int]], first_expert: int) -> Trajectory:
    """turns: numbers of tokens and of observed tokens. Expert numbers count up from token to token, layer, choice."""
    said = tuple(Turn((9,) * n, (-1.0,) * n, (8,) * seen, "search", "stop", (VersionSpan(0, 0, n),))
                 for n, seen in turns)
    plain = Trajectory(name, "g", "t", (1,) * prompt, (2,) * privileged, said)
    tokens = prompt + len(plain.continuation)
    experts = np.arange(first_expert, first_expert + tokens * 6).reshape(tokens, 3, 2)
    experts[-1] = -1
    return replace(plain, routed_experts=experts.astype(np.int16))


TRAJECTORIES = [trajectory("a", 3, 5, [(2, 4), (3, 0)], 0), trajectory("b", 4, 2, [(1, 0)], 500)]


def test_experts_are_a_column_of_the_students_layout():
    batch = from_trajectories(TRAJECTORIES)
    for one, tokens, experts in zip(TRAJECTORIES, batch["tokens"], batch["routed_experts"], strict=True):
        assert experts.dtype == np.int16 and len(experts) == len(tokens)
        np.testing.assert_array_equal(experts, one.routed_experts)


def test_the_teacher_reads_the_continuation_with_the_students_experts():
    batch = from_trajectories(TRAJECTORIES, privileged=True)
    student = from_trajectories(TRAJECTORIES)
    for i, one in enumerate(TRAJECTORIES):
        experts, prompt = batch["routed_experts"][i], len(one.privileged_prompt)
        assert experts.shape == (len(batch["tokens"][i]), 3, 2) and experts.dtype == np.int16
        assert (experts[:prompt] == -1).all()
        for token in range(len(one.continuation)):
            np.testing.assert_array_equal(experts[prompt + token], one.routed_experts[len(one.prompt) + token])
        np.testing.assert_array_equal(
            experts[batch["loss_mask"][i] > 0], student["routed_experts"][i][student["loss_mask"][i] > 0])


@pytest.mark.parametrize("privileged", [False, True])
def test_dense_trajectories_have_no_such_column(privileged):
    dense = [replace(one, routed_experts=None) for one in TRAJECTORIES]
    assert "routed_experts" not in from_trajectories(dense, privileged)
    assert "routed_experts" not in from_trajectories([], privileged)


def test_experts_of_some_trajectories_only_are_an_error():
    with pytest.raises(SchemaError, match=r"1 of 2 trajectories have no routed experts: \['b'\]"):
        from_trajectories([TRAJECTORIES[0], replace(TRAJECTORIES[1], routed_experts=None)])

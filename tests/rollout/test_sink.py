"""Finished trajectories on disk, and what the next run makes of them."""

from __future__ import annotations

from scripted_rollout import expected, requests

from megatron_pbsd.config import RolloutConfig
from megatron_pbsd.rollout.sink import TrajectorySink, read_trajectories, taken_up

LIMITS = RolloutConfig(max_turns=4, max_turn_tokens=10, max_context=60)
MADE = [expected(request, sample, 1, 5, LIMITS) for request in requests(2, 2) for sample in range(2)]


def write(path, trajectories, torn=""):
    with TrajectorySink(path) as sink:
        for trajectory in trajectories:
            sink.write(trajectory)
    with path.open("a") as file:
        file.write(torn)


def test_a_rollout_of_the_same_origin_is_taken_up_and_goes_on_in_its_file(tmp_path):
    path = tmp_path / "step_000001.unscored.jsonl"
    assert taken_up(path, "weights a") == []
    write(path, MADE[:3], torn='{"trajectory_id": "1/')
    for _ in range(2):  # and may die again
        assert taken_up(path, "weights a") == MADE[:3]
    write(path, MADE[3:])
    assert read_trajectories(path) == MADE


def test_a_rollout_of_another_origin_is_begun_anew(tmp_path):
    path = tmp_path / "step_000001.unscored.jsonl"
    assert taken_up(path, "weights a") == []
    write(path, MADE[:3])
    assert taken_up(path, "weights b") == [] and not path.exists()
    write(path, MADE[3:])
    assert taken_up(path, "weights b") == MADE[3:]


def test_what_has_no_origin_is_not_taken_up(tmp_path):
    path = tmp_path / "step_000001.unscored.jsonl"
    write(path, MADE)
    assert taken_up(path, "weights a") == [] and not path.exists()

"""Learner and engines that hand their memory over come to what those come to that keep it, whoever dies in between."""

from __future__ import annotations

import pytest
from pbsd_process import SMALL, none_left

pytestmark = pytest.mark.slow
OPTIONS = (*SMALL, "--checkpoint.every", "2", "--evaluation.every", "2", "--rollout.policy", "longest_remaining")
HANDED = ("--learner.release_memory", "true", "--rollout.sleep", "all")
KEYS = {"reward/mean", "loss/total", "grad_norm", "rollout/tokens", "eval/exact_match"}


def agree(rows, whole):
    assert [row["step"] for row in rows] == [row["step"] for row in whole]
    for ours, theirs in zip(rows[1:], whole[1:], strict=True):
        assert ("eval/exact_match" in ours) == ("eval/exact_match" in theirs)
        for key in KEYS & theirs.keys():
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-6), (ours["step"], key)


@pytest.fixture(scope="module")
def kept(pbsd):
    return pbsd("kept", *OPTIONS, "--steps", "6").succeed()


@pytest.mark.parametrize("sleep", ["kv_cache", "all"])
def test_a_run_comes_to_the_same(pbsd, kept, sleep):
    agree(pbsd(f"handed-{sleep}", *OPTIONS, *HANDED, "--rollout.sleep", sleep, "--steps", "6").succeed(), kept)


def test_groups_that_are_carried(pbsd):
    """Nothing is in flight when a step that over-samples ends."""
    rows = pbsd("carried", *SMALL, *HANDED, "--steps", "4", "--checkpoint.every", "2", "--rollout.over_sampling", "1.5",
                "--rollout.max_staleness", "2").succeed()
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert any(row.get("partial/carried_groups", 0) for row in rows)


def test_an_engine_that_dies_while_it_sleeps_is_started_anew(pbsd, kept):
    run = pbsd("dies-asleep", *OPTIONS, *HANDED, "--steps", "6")
    run.wait_for_step(2)
    run.component("engine-0").kill()
    code, errors = run.finish()
    assert code == 0, errors
    assert errors.count("engine-0 died: ") == 1
    agree(run.rows(), kept)


def test_weights_of_a_lost_learner_are_in_the_segment(pbsd):
    """The engines' own may be asleep."""
    run = pbsd("learner-dies", *OPTIONS, *HANDED, "--checkpoint.every", "0", "--steps", "1000")
    run.wait_for_step(3)
    family = run.family()
    run.component("learner-1").kill()
    code, errors = run.finish()
    assert code == 1 and none_left(family) and "Traceback" not in errors
    done = max(row["step"] for row in run.rows())
    assert f"the weights of step {done}, which the learner has lost, were recovered from the engines" in errors
    rows = pbsd("learner-dies", *OPTIONS, *HANDED, "--checkpoint.every", "0", "--steps", str(done + 1),
                "--resume").succeed()
    assert rows[-1]["recovered/weights_step"] == done

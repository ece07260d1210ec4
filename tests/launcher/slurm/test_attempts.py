"""When another attempt follows, and how an ended one is explained."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, strategies as st

from launcher.slurm.attempts import PREEMPTED, TIME_LIMIT, Attempt, explain, identical, judge, kind, last_error

LIMIT = 3
ERRORS = ("learner: rank 1 of 4 died", "engine-0: CUDA error", "")


def attempt(number: int = 1, step: int = 0, exit_code: int | None = 1, **others: object) -> Attempt:
    return Attempt(number, "7", ("node1", "node2"), 100.0 * number, 100.0 * number + 50, exit_code, step, **others)


attempts = st.lists(
    st.builds(attempt, exit_code=st.sampled_from([1, 1, 1, 75, 137, None]), step=st.integers(0, 3),
              error=st.sampled_from(ERRORS), asked=st.sampled_from(["", TIME_LIMIT, PREEMPTED])),
    min_size=1, max_size=8)


@given(attempts, st.integers(1, 4))
def test_only_a_row_of_identical_failures_without_a_step_ends_a_run(made, limit):
    verdict = judge(made, limit)
    last = made[-1]
    by_request = last.exit_code == 75 and not last.asked
    # Brute force: whether the last `limit` attempts ended alike and none got beyond all that were before it.
    row = made[-limit:]
    looping = len(made) >= limit and all(
        one.exit_code is not None and kind(one) == kind(last)
        and one.step <= max((a.step for a in made[:len(made) - limit + i]), default=0)
        for i, one in enumerate(row))
    assert (verdict.action == "stop") == (looping or by_request)


@given(attempts)
def test_progress_ends_a_row_of_failures(made):
    further = dataclasses.replace(made[-1], step=max(one.step for one in made) + 1)
    assert not identical([*made, further])
    assert judge([*made, further], 1).action != "stop" or further.exit_code == 75


@given(st.sampled_from(ERRORS), st.integers(0, 10 ** 9), st.integers(0, 10 ** 9))
def test_errors_that_differ_by_chance_are_alike(error, one, other):
    def made(n: int) -> Attempt:
        return attempt(error=f"{error} at 0x{n:x} after {n}.5 s, see /tmp/pbsd-{n:x}/ray.log")

    assert kind(made(one)) == kind(made(other))
    assert kind(attempt(error="engine-0: died")) != kind(attempt(error="learner: died"))


@pytest.mark.parametrize(("ended", "action", "words"), [
    ({"exit_code": 0, "step": 60}, "done", "complete at step 60"),
    ({"exit_code": 2, "error": "usage: no such model"}, "stop", "no such model"),
    ({"exit_code": 1, "error": "learner: rank 0 died"}, "again", "failed at step 4: learner: rank 0 died"),
    ({"exit_code": 137}, "again", "killed at step 4 by SIGKILL, as the kernel does when memory is short"),
    ({"exit_code": 139}, "again", "killed at step 4 by SIGSEGV"),
    ({"exit_code": 1, "failed_nodes": ("node2",)}, "requeue", "lost node2, which failed"),
    ({"exit_code": None}, "requeue", "without a word: node1 or node2 failed"),
    ({"exit_code": None, "state": "NODE_FAIL"}, "requeue", "Slurm found to have failed"),
    ({"exit_code": 75, "asked": TIME_LIMIT}, "requeue", "with a checkpoint before its time limit"),
    ({"exit_code": 75, "asked": PREEMPTED}, "requeue", "make way for a job of higher priority"),
    ({"exit_code": 75}, "stop", "as somebody asked"),
    ({"exit_code": 143, "state": "TIMEOUT"}, "requeue", "killed at step 4 at its time limit"),
    ({"exit_code": 143, "state": "PREEMPTED"}, "requeue", "make way"),
    ({"exit_code": 143, "state": "CANCELLED"}, "stop", "cancelled at step 4"),
    ({"exit_code": 137, "state": "OUT_OF_MEMORY"}, "requeue", "used more memory than it may"),
])
def test_how_attempts_end(ended, action, words):
    one = attempt(**({"step": 4} | ended))
    verdict = judge([one], LIMIT)
    assert (verdict.action, words in verdict.reason) == (action, True), verdict
    assert verdict.reason.startswith(explain(one))


def test_a_run_that_gets_nowhere_before_its_time_limit_is_given_up():
    row = [attempt(n, exit_code=75, asked=TIME_LIMIT) for n in (1, 2, 3)]
    assert judge(row[:2], LIMIT).action == "requeue"
    assert judge(row, LIMIT).action == "stop"
    assert "takes longer than an attempt" in judge(row, LIMIT).reason


def test_the_common_error_of_a_crash_loop_is_said():
    row = [attempt(n, step=5, error=f"learner: rank {n} died") for n in range(1, 5)]
    # The first got to step 5; the three after it got no further.
    assert judge(row[:3], LIMIT).action == "again"
    verdict = judge(row, LIMIT)
    assert verdict.action == "stop"
    assert "3 attempts in a row did no step beyond 5" in verdict.reason and "learner: rank 4 died" in verdict.reason


@pytest.mark.parametrize(("log", "error"), [
    ("step 3/9\npbsd: learner: rank 1 died\n      (traceback: runs/a/error.log)\n", "learner: rank 1 died"),
    ("pbsd: recovered weights of step 3\npbsd: engine-0: died:\n      Killed\n      (traceback: x)\nslurmstepd: y\n",
     "engine-0: died: Killed"),
    ("step 3/9\n", ""), ("", ""),
])
def test_the_last_error_of_a_log(log, error):
    assert last_error(log) == error

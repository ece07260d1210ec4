"""Who is at fault, told from what the ranks say of themselves."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
from hypothesis import given, strategies as st

from megatron_pbsd.learner.hang import (
    Frame,
    LearnerHung,
    Report,
    Silence,
    Verdict,
    describe,
    is_collective,
    judge,
    ranks_text,
)

OWN = Frame("/code/loss.py", 7, "loss", "total = surrogate(values)")
REDUCE = Frame("/env/torch/distributed/distributed_c10d.py", 3195, "all_reduce", "work.wait()")
WAITS = Report("process 1 on a", 4, "step", "inside", 2.0, "micro-batch 2/3", 1.5, "", (OWN, REDUCE))
BUSY = replace(WAITS, stack=(OWN,))
FAILED = replace(WAITS, state="failed", error="ValueError: no", stack=())
GONE = Silence("is gone: process 2 on a has ended")


@pytest.mark.parametrize(("frame", "waits"), [
    (REDUCE, True),
    (Frame("/env/megatron/core/pipeline_parallel/p2p_communication.py", 1, "f", "req.wait()"), True),
    (Frame("/env/megatron/core/distributed/param_and_grad_buffer.py", 1, "f", "self.handle.wait()"), True),
    (Frame("/env/torch/cuda/__init__.py", 1, "synchronize", "return torch._C._cuda_synchronize()"), True),
    (Frame("/usr/lib/python3.11/threading.py", 327, "wait", "waiter.acquire()"), False),
    (Frame("/code/loss.py", 1, "f", "time.sleep(9)"), False),
])
def test_only_collectives_are_waiting(frame, waits):
    assert is_collective((OWN, frame)) is waits
    assert not is_collective((frame, OWN)) and not is_collective(())


@pytest.mark.parametrize(("answers", "behind"), [
    ({0: WAITS, 1: BUSY, 2: WAITS}, (1,)),
    ({0: WAITS, 1: BUSY, 2: GONE}, (2,)),  # rank 1 may be late because of rank 2
    ({0: BUSY, 1: WAITS, 2: GONE}, (0, 2)),  # but rank 0, which asks, is so by itself
    ({0: WAITS, 1: FAILED, 2: BUSY}, (1,)),
    ({0: WAITS, 1: replace(BUSY, entered=9), 2: replace(BUSY, entered=3, phase="log_probs", state="left")}, (2, 1)),
    ({0: WAITS, 1: replace(WAITS, phase="log_probs"), 2: WAITS}, (1,)),
    ({0: WAITS, 1: WAITS, 2: replace(WAITS, stack=(OWN._replace(line=9), REDUCE))}, (2,)),
    ({0: WAITS, 1: WAITS, 2: replace(WAITS, state="broken off", stack=())}, ()),
    ({0: WAITS, 1: WAITS, 2: WAITS}, ()),
])
def test_the_ranks_at_fault(answers, behind):
    assert judge(0, answers).behind == behind


def test_a_verdict_that_a_rank_has_reached_is_adopted():
    reached = Verdict((1,), "rank 1 slept")
    left = replace(WAITS, state="left", verdict=reached)
    assert judge(0, {0: replace(WAITS, state="broken off"), 1: WAITS, 2: left}) == reached


reports = st.builds(
    Report, where=st.text(), entered=st.integers(0, 9), phase=st.sampled_from(["step", "log_probs"]),
    state=st.sampled_from(["inside", "left", "failed", "broken off"]), elapsed_s=st.floats(0, 9), mark=st.text(),
    mark_s=st.floats(0, 9), error=st.text(), stack=st.sampled_from([(), (OWN,), (OWN, REDUCE)]),
    verdict=st.none() | st.builds(Verdict, st.lists(st.integers(0, 9)).map(tuple), st.text()))
alone = reports.map(lambda report: replace(report, verdict=None))


@given(reports)
def test_reports_travel_unchanged(report):
    assert Report.decode(report.encode()) == report


@given(alone, st.dictionaries(st.integers(1, 300), alone | st.builds(Silence, st.text())))
def test_blame_is_complete(mine, others):
    """Whoever is gone is at fault; without any of those, whoever does not wait is; the others are accounted for."""
    answers = {0: mine, **others}
    behind = judge(0, answers).behind
    gone = {r for r, a in answers.items() if isinstance(a, Silence) or a.state == "failed"}
    assert gone <= set(behind) <= answers.keys() and len(set(behind)) == len(behind)
    if not gone:
        busy = {r for r, a in answers.items() if not a.waits}
        assert set(behind) == busy or not busy


def test_the_message():
    answers = {0: WAITS, 1: BUSY, 2: WAITS, 3: WAITS, 4: replace(WAITS, phase="other")}
    error = LearnerHung(0, "step", 1.0, 2.04, Verdict((1,), describe(answers, (1,))))
    assert str(error) == """phase 'step' (deadline 1 s) hung on rank 0 after 2.0 s because of rank 1
rank 1 is in no collective in phase 'step' since 2.0 s, at 'micro-batch 2/3' since 1.5 s (process 1 on a)
  File "/code/loss.py", line 7, in loss
    total = surrogate(values)
ranks 0, 2–3: waiting in phase 'step' at 'micro-batch 2/3', /code/loss.py:7 in loss
rank 4: waiting in phase 'other' at 'micro-batch 2/3', /code/loss.py:7 in loss"""
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_many_ranks_at_fault_are_listed_but_not_all_shown():
    text = describe(dict.fromkeys(range(256), GONE), range(256))
    assert text.count("is gone") == 8 and text.endswith("and ranks 8–255")


@given(st.sets(st.integers(0, 40), min_size=1))
def test_ranks_in_words(ranks):
    found = set()
    for part in ranks_text(ranks).split(" ", 1)[1].split(", "):
        first, _, last = part.partition("–")
        found |= set(range(int(first), int(last or first) + 1))
    assert found == ranks

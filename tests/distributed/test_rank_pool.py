"""The pool itself: a rank that dies, raises or hangs ends the test with its name, and the next test can go on."""

from __future__ import annotations

import os
import threading

import pytest
from rank_pool import RankFailure


def die(rank, rendezvous):
    if rank == 1:
        os._exit(7)


def hang(rank, rendezvous):
    if rank == 0:
        threading.Event().wait()


def fail(rank, rendezvous):
    raise KeyError(f"from {rank}")


def answer(rank, rendezvous):
    return rank


@pytest.mark.parametrize(("function", "words"), [
    (die, "rank 1 died"), (hang, r"ranks \[0\] did not answer within 0.5 s"), (fail, "(?s)raised.*from [01]")])
def test_failures_are_named_and_leave_a_working_pool(ranks, function, words):
    with pytest.raises(RankFailure, match=words):
        ranks.run(function, 2, deadline_s=0.5 if function is hang else 60)
    assert ranks.run(answer, 4) == [0, 1, 2, 3]

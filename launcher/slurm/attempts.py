"""Attempts at a run: what is recorded of each, whether another one follows, and why one ended. Pure.

A run's job is started, and after a time limit, preemption or failure started again, until the run is complete. Each
start is an attempt; the run goes on from its newest checkpoint.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

DONE, USAGE, STOPPED = 0, 2, 75
"""Exit codes of `pbsd train`."""
TIME_LIMIT, PREEMPTED = "time limit", "preemption"
OUT_OF_MEMORY = ("OUT_OF_MEMORY", "OOM")
CANCELLED, COMPLETING = "CANCELLED", "COMPLETING"
TAKEN_AWAY = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "NODE_FAIL", "PREEMPTED", COMPLETING)
"""States of a job that Slurm ended, and not because of what the run did."""
LONGEST_ERROR = 300
"""Characters that are kept of an error: the log has all."""


@dataclass(frozen=True)
class Attempt:
    """number:  from 1. job: Slurm's number of the job, '12' or '12_3'; '' without Slurm.
    nodes:      the machines. failed_nodes: those of them that were found to be down.
    started:    seconds since 1970. ended: None while it goes on.
    exit_code:  the driver's, 128 + the signal that killed it; None when it was not seen to end.
    step:       newest step that was complete when it ended.
    asked:      why Slurm asked it to end: TIME_LIMIT, PREEMPTED or ''.
    state:      Slurm's state of the job as it ended, such as RUNNING (it ended by itself), CANCELLED or TIMEOUT.
    error:      what it failed of, in the words of the program; '' when it did not say.
    """

    number: int
    job: str
    nodes: tuple[str, ...]
    started: float
    ended: float | None = None
    exit_code: int | None = None
    step: int = 0
    asked: str = ""
    state: str = ""
    error: str = ""
    failed_nodes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """done:   the run is complete.
    again:     another attempt, in the same allocation if its nodes are well.
    requeue:   another attempt, in another allocation.
    stop:      no other attempt: it would end in the same way, or the run was cancelled.
    """

    action: Literal["done", "again", "requeue", "stop"]
    reason: str


def judge(attempts: Sequence[Attempt], max_identical: int) -> Verdict:
    """What follows after the last of `attempts`, which has ended."""
    last = attempts[-1]
    reason = explain(last)
    if last.exit_code == DONE:
        return Verdict("done", reason)
    if last.state.startswith(CANCELLED):
        return Verdict("stop", reason)
    if last.exit_code == USAGE:
        return Verdict("stop", f"{reason}. Another attempt would say the same")
    if last.exit_code == STOPPED and not last.asked:
        return Verdict("stop", f"{reason}, as somebody asked it to")
    alike = identical(attempts)
    if len(alike) >= max_identical:
        if last.exit_code == STOPPED:
            return Verdict("stop", f"{len(alike)} attempts in a row ended before their first step: a step takes longer "
                                   f"than an attempt may")
        return Verdict("stop", f"{len(alike)} attempts in a row did no step beyond {last.step} and failed alike: "
                               f"{reason}")
    own_failure = last.exit_code not in (None, STOPPED) and last.state in ("", "RUNNING") and not last.failed_nodes
    return Verdict("again" if own_failure else "requeue", reason)


def identical(attempts: Sequence[Attempt]) -> Sequence[Attempt]:
    """The last attempts, as many as ended in the same way and did no step that had not been done before them. Those
    that nobody saw the end of, or whose nodes failed, are no failures of the run and end the row."""
    first = len(attempts)
    while first > 0:
        one, before = attempts[first - 1], attempts[:first - 1]
        lost = one.exit_code is None or one.failed_nodes or one.state in TAKEN_AWAY
        if lost or one.step > max((a.step for a in before), default=0) or kind(one) != kind(attempts[-1]):
            break
        first -= 1
    return attempts[first:]


def kind(attempt: Attempt) -> tuple[int | None, str]:
    """Equal for attempts that failed in the same way: the exit code, and the error without what differs by chance —
    numbers, addresses, paths."""
    error = re.sub(r"(?<!\w)/[^\s:,;)\]]+", "/…", attempt.error)
    return attempt.exit_code, re.sub(r"0x[0-9a-fA-F]+|\d+(\.\d+)?", "#", error)


def explain(attempt: Attempt) -> str:
    """How it ended, in one sentence without the full stop."""
    code, at = attempt.exit_code, f"at step {attempt.step}"
    if attempt.ended is None:
        return f"runs on {', '.join(attempt.nodes)}" if attempt.nodes else "runs"
    if code == DONE:
        return f"complete {at}"
    if attempt.state.startswith(CANCELLED):
        return f"cancelled {at}"
    if code == STOPPED:
        why = {TIME_LIMIT: " before its time limit", PREEMPTED: " to make way for a job of higher priority"}
        return f"stopped {at} with a checkpoint{why.get(attempt.asked, '')}"
    if attempt.failed_nodes:
        return f"lost {', '.join(attempt.failed_nodes)}, which failed, {at}" + (
            f" ({attempt.error})" if attempt.error else "")
    if attempt.state == "TIMEOUT":
        return f"killed {at} at its time limit, before the step it was in was done"
    if attempt.state == "PREEMPTED" or (attempt.asked == PREEMPTED and code != 1):
        return f"killed {at} to make way for a job of higher priority, before the step it was in was done"
    if attempt.state in OUT_OF_MEMORY:
        return f"killed {at} because it used more memory than it may"
    if attempt.state == "NODE_FAIL":
        return f"lost one of {', '.join(attempt.nodes)}, which Slurm found to have failed, {at}"
    if attempt.state == COMPLETING:
        return f"ended {at} by Slurm, which has cancelled or requeued it"
    if attempt.state in TAKEN_AWAY:
        return f"lost {' or '.join(attempt.nodes) or 'its nodes'} {at}: Slurm has requeued it"
    if code is None:
        return f"ended {at} without a word: {' or '.join(attempt.nodes) or 'its node'} failed, or Slurm killed it"
    if attempt.error:
        return f"failed {at}: {attempt.error}"
    if code > 128:
        return f"killed {at} by {_signal(code - 128)}" + (
            ", as the kernel does when memory is short" if code == 128 + signal.SIGKILL else "")
    return f"failed {at} with exit code {code} and no error of its own: see its log"


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def last_error(log: str) -> str:
    """What `pbsd` said last of why it failed, from the end of its output; '' when it did not say.

    >>> last_error("step 3/9\\npbsd: learner: rank 1 died\\n      (traceback: runs/a/error.log)\\n")
    'learner: rank 1 died'
    """
    found = re.findall(r"^pbsd: (.+(?:\n(?!pbsd: )[ \t]+.*)*)", log, re.MULTILINE)
    lines = [line.strip() for line in found[-1].splitlines()] if found else []
    text = " ".join(line for line in lines if line and not line.startswith("(traceback:"))
    return text if len(text) <= LONGEST_ERROR else text[:LONGEST_ERROR - 1] + "…"

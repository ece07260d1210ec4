"""`pbsd attempt`: what a job's script does between its steps. See slurm/job.sh.j2 for the order."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

from launcher.slurm import commands
from launcher.slurm.attempts import (
    CANCELLED,
    COMPLETING,
    DONE,
    PREEMPTED,
    STOPPED,
    TAKEN_AWAY,
    TIME_LIMIT,
    Attempt,
    Verdict,
    judge,
    last_error,
)
from launcher.slurm.commands import SlurmError
from launcher.slurm.records import attempt_log, excluded, read_attempts, read_job, write_attempt
from megatron_pbsd.config import SlurmConfig
from megatron_pbsd.config.cluster import seconds_of
from megatron_pbsd.observability.records import METRICS, read_metrics
from megatron_pbsd.stopping import STOP

LOG_END_BYTES = 64 << 10
PROBE_S = 30.0
"""In which all nodes of a job have to start a process, to be used for another attempt."""
UNSEEN_ENDS = ("CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY")
MARGIN_S = 90
"""By which Slurm may tell a job too early that its time limit is near."""


def begin(run: Path, slurm: SlurmConfig) -> tuple[int, Verdict | None]:
    """Record a new attempt, and what became of one that died without a word. Its number, and why it must not be made
    if that is so."""
    attempts = read_attempts(run)
    if attempts and attempts[-1].ended is None:
        attempts[-1] = lost(run, attempts[-1])
        write_attempt(run, attempts[-1])
    job = commands.own_number()
    number = attempts[-1].number + 1 if attempts else 1
    # Those of an earlier submission are history: whoever submits anew has mended something.
    mine = [attempt for attempt in attempts if attempt.job == job]
    if mine and (verdict := judge(mine, slurm.max_identical_failures)).action in ("stop", "done"):
        return number, verdict
    (run / STOP).unlink(missing_ok=True)
    nodes = commands.hostnames(os.environ.get("SLURM_JOB_NODELIST", ""))
    write_attempt(run, Attempt(number, job, nodes, time.time(), step=newest_step(run)))
    return number, None


def end(run: Path, slurm: SlurmConfig, exit_code: int) -> Verdict:
    """Record how the attempt that goes on has ended, and have Slurm requeue its job if that is to follow. `again` is
    for the caller to do."""
    attempts = read_attempts(run)
    last = attempts[-1]
    state = last.state or state_of(commands.job(last.job), time.time())
    last = dataclasses.replace(
        last, ended=time.time(), exit_code=exit_code, step=max(newest_step(run), last.step), state=state,
        failed_nodes=commands.down(last.nodes) if state in TAKEN_AWAY else (),
        error="" if exit_code in (DONE, STOPPED) else last_error(end_of(attempt_log(run, last.number))))
    write_attempt(run, last)
    mine = [attempt for attempt in [*attempts[:-1], last] if attempt.job == last.job]
    verdict = judge(mine, slurm.max_identical_failures)
    if verdict.action == "again" and (bad := set(excluded(run)) & set(last.nodes)):
        verdict = Verdict("requeue", f"{verdict.reason}; without {', '.join(sorted(bad))}")
    elif verdict.action == "again" and not nodes_are_well():
        last = dataclasses.replace(last, failed_nodes=commands.down(last.nodes))
        write_attempt(run, last)
        verdict = Verdict("requeue", f"{verdict.reason}; not all of {', '.join(last.nodes)} answer")
    if verdict.action in ("again", "requeue") and not slurm.requeue:
        return Verdict("stop", f"{verdict.reason}; cluster.slurm.requeue = false")
    if verdict.action == "requeue":
        if state not in ("PENDING", COMPLETING):  # Slurm has not decided itself.
            commands.requeue(last.job)
        leave_out(last.job, run, slurm)
    return verdict


def cancel(run: Path) -> str:
    """Cancel the run's job; its number. That is recorded first: see `state_of`."""
    number, attempts = read_job(run)["job"], read_attempts(run)
    if attempts and attempts[-1].ended is None:
        write_attempt(run, dataclasses.replace(attempts[-1], state=CANCELLED))
    commands.cancel(number)
    return number


def stop(run: Path, slurm: SlurmConfig) -> str:
    """Ask the run to end after its step, and record why Slurm asked for that."""
    (run / STOP).touch()
    last = read_attempts(run)[-1]
    asked = why_asked(commands.job(last.job), time.time(), slurm.stop_before_s)
    write_attempt(run, dataclasses.replace(last, asked=asked))
    return asked


def why_asked(job: Mapping[str, str], now: float, stop_before_s: int) -> str:
    """Why Slurm signals a job now: because of its time limit if no more of that is left than `stop_before_s`, give or
    take Slurm's accuracy; or else because of another job. `job` as scontrol shows it."""
    if not _is_preempted(job) and _limit(job) - now <= stop_before_s + MARGIN_S:
        return TIME_LIMIT
    return PREEMPTED


def state_of(job: Mapping[str, str], now: float) -> str:
    """Slurm's state of a job whose script is about to end. A job that Slurm ends is shown as COMPLETING, whatever it
    ends of, while one of its processes is there: what other signs tell of it. `job` as scontrol shows it."""
    state = job.get("JobState", "")
    if state != COMPLETING:
        return state
    return "PREEMPTED" if _is_preempted(job) else "TIMEOUT" if now >= _limit(job) else state


def _is_preempted(job: Mapping[str, str]) -> bool:
    return job.get("PreemptTime", "None") not in ("None", "Unknown")


def _limit(job: Mapping[str, str]) -> float:
    """When its time limit is; inf without one."""
    limit, started = job.get("TimeLimit", "UNLIMITED"), job.get("StartTime", "Unknown")
    if limit in ("UNLIMITED", "Partition_Limit") or started == "Unknown":
        return math.inf
    return datetime.fromisoformat(started).timestamp() + seconds_of(limit)


def lost(run: Path, attempt: Attempt) -> Attempt:
    """The record of an attempt that nobody saw the end of. Of a job that does not run any more Slurm may know it."""
    log = attempt_log(run, attempt.number)
    state = commands.job(attempt.job).get("JobState", "") if attempt.job not in ("", commands.own_number()) else ""
    heard = [path.stat().st_mtime for path in (log, run / METRICS) if path.exists()]
    return dataclasses.replace(
        attempt, ended=max([attempt.started, *heard]), step=max(newest_step(run), attempt.step),
        state=attempt.state or (state if state in UNSEEN_ENDS else ""), error=last_error(end_of(log)),
        failed_nodes=commands.down(attempt.nodes))


def newest_step(run: Path) -> int:
    rows = read_metrics(run)
    return int(rows[-1]["step"]) if rows else 0


def end_of(log: Path) -> str:
    if not log.exists():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - LOG_END_BYTES))
        return file.read().decode(errors="replace")


def nodes_are_well() -> bool:
    """Whether every node of the job starts a process."""
    try:
        probe = commands.attempt("srun", "--overlap", "--ntasks-per-node=1", "true", deadline_s=PROBE_S)
        return probe.returncode == 0
    except SlurmError:
        return False


def leave_out(job: str, run: Path, slurm: SlurmConfig) -> None:
    """Have Slurm give the requeued job no nodes that have been excluded since it was submitted."""
    if nodes := dict.fromkeys([*slurm.exclude, *excluded(run)]):
        commands.exclude(job, list(nodes))

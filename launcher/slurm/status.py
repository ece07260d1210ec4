"""`pbsd status`: a submitted run, attempt by attempt, and what becomes of it."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import yaml

from launcher.slurm import commands
from launcher.slurm.attempts import Attempt, explain, judge
from launcher.slurm.job import lost, newest_step
from launcher.slurm.records import read_attempts, read_job
from launcher.slurm.submit import ENDED
from megatron_pbsd.observability.records import CONFIG

WAITS = {
    "Resources": "until nodes are free", "Priority": "behind jobs of higher priority",
    "BeginTime": "as requeued jobs do: Slurm lets two minutes pass (`pbsd status --wait` does not)",
    "Dependency": "for other jobs", "PartitionDown": "until its partition is up",
    "ReqNodeNotAvail": "for nodes that are down, drained or reserved",
    "JobHeldUser": "held; `scontrol release` lets it go", "JobHeldAdmin": "held by an administrator",
    "JobArrayTaskLimit": "until other seeds have ended",
}
POLL_S = 2.0
WIDTH = 200
"""Of tables that go to a file."""


@dataclass(frozen=True)
class Status:
    """state:  complete, running, waiting, ended (another submission is needed), or unknown.
    slurm: Slurm's state of the job. reason: one sentence. step, steps: done, and in all.
    attempts: those of this submission and before.
    """

    run: str
    job: str
    state: str
    slurm: str
    reason: str
    step: int
    steps: int
    attempts: tuple[Attempt, ...]

    def to_json(self) -> str:
        data = dataclasses.asdict(self)
        for attempt, recorded in zip(self.attempts, data["attempts"]):
            recorded["outcome"] = explain(attempt)
        return json.dumps(data)


def status_of(run: Path) -> Status:
    """UsageError when the run was not submitted."""
    number = read_job(run)["job"]
    config = yaml.safe_load((run / CONFIG).read_text(encoding="utf-8"))
    job = commands.job(number)
    slurm = job.get("JobState", "").split(" ")[0]
    attempts = [_closed(run, attempt, job, slurm) for attempt in read_attempts(run)]
    mine = [attempt for attempt in attempts if attempt.job == number]
    state, reason = _summary(mine, job, slurm, config["cluster"]["slurm"]["max_identical_failures"])
    return Status(str(run), number, state, slurm, reason, newest_step(run), config["steps"], tuple(attempts))


def _closed(run: Path, attempt: Attempt, job: dict[str, str], slurm: str) -> Attempt:
    """An attempt whose end nobody has recorded, though its job does not run any more."""
    if attempt.ended is not None or slurm in ("RUNNING", "COMPLETING", "SUSPENDED"):
        return attempt
    return dataclasses.replace(lost(run, attempt), state=slurm if slurm in ENDED else "")


def _summary(mine: list[Attempt], job: dict[str, str], slurm: str, max_identical: int) -> tuple[str, str]:
    if slurm in ("RUNNING", "COMPLETING", "SUSPENDED"):
        return "running", explain(mine[-1]) if mine else "starts"
    if slurm not in ENDED:
        why = job.get("Reason", "").split(",")[0]
        then = f"; the attempt before {explain(mine[-1])}" if mine else ""
        return "waiting", f"waits {WAITS.get(why, f'({why})')}{then}"
    if not mine:
        return "ended" if slurm else "unknown", (
            f"the job ended as {slurm} before the run began: see slurm/*.log" if slurm
            else "Slurm does not know the job any more, and the run never began")
    verdict = judge(mine, max_identical)
    return "complete" if verdict.action == "done" else "ended", verdict.reason


def wait(run: Path) -> Status:
    """Until it neither runs nor waits. Attempts that Slurm only lets wait for having been requeued begin soon."""
    while True:
        status = status_of(run)
        if status.state not in ("running", "waiting"):
            return status
        job = commands.job(status.job)
        if only_waits(job, time.time()):
            commands.start_soon(status.job)
        time.sleep(POLL_S)


def only_waits(job: Mapping[str, str], now: float) -> bool:
    """Whether it waits, and still for some time, for nothing but having been requeued. `job` as scontrol shows it."""
    if job.get("JobState") != "PENDING" or job.get("Reason") != "BeginTime" or job.get("Restarts", "0") == "0":
        return False
    start = job.get("StartTime", "Unknown")
    return start == "Unknown" or datetime.fromisoformat(start).timestamp() - now > commands.SOON_S


def print_status(status: Status) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    console.print(f"{status.run}: job {status.job}, {status.state}, step {status.step} of {status.steps}: "
                  f"{status.reason}", highlight=False, soft_wrap=True)
    if not status.attempts:
        return
    table = Table("attempt", "job", "nodes", "began", "took", "exit", "step", "how it ended", box=None,
                  header_style="dim")
    for one in status.attempts:
        took = (one.ended or time.time()) - one.started
        table.add_row(str(one.number), one.job, " ".join(one.nodes),
                      datetime.fromtimestamp(one.started).isoformat(" ", "seconds"), f"{took:.0f} s",
                      "–" if one.exit_code is None else str(one.exit_code), str(one.step), explain(one))
    console.print(table)

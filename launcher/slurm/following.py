"""`pbsd logs`: what the attempts at a run printed."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from launcher.slurm import commands
from launcher.slurm.records import attempt_log, job_folder, read_attempts, read_job
from launcher.slurm.submit import ENDED
from megatron_pbsd.errors import UsageError

POLL_S = 1.0


def print_logs(run: Path, number: int | None, follow: bool) -> None:
    """Of the newest attempt, or attempt `number`. `follow`: and of those after it, until the job has ended."""
    job = read_job(run)["job"]
    have = [attempt.number for attempt in read_attempts(run)]
    if number is not None and number not in have:
        near = min(have, key=lambda other: abs(other - number), default=None)
        raise UsageError(f"{run} has no attempt {number}" + (f"; the nearest is {near}" if near else ""))
    if not have and not follow:
        raise UsageError(f"no attempt has begun at {run}: `pbsd status {run}` says why; what the job script printed "
                         f"is in {job_folder(run)}")
    current, offset = number or (have[-1] if have else 1), 0
    while True:
        ended = follow and commands.job(job).get("JobState", "").split(" ")[0] in ENDED
        offset = _print_from(attempt_log(run, current), offset)
        newer = attempt_log(run, current + 1).parent.exists()
        if follow and newer:
            current, offset = current + 1, 0
            print(f"--- attempt {current}", file=sys.stderr)
        elif not follow or ended:
            return
        else:
            time.sleep(POLL_S)


def _print_from(log: Path, offset: int) -> int:
    if not log.exists():
        return offset
    with log.open("rb") as file:
        file.seek(offset)
        text = file.read()
    sys.stdout.write(text.decode(errors="replace"))
    sys.stdout.flush()
    return offset + len(text)

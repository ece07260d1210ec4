"""What a submitted run's folder holds beside the run's own records.

    slurm/job.sh, job.json, changes.diff   the script; its job's number, and git's state; what is not committed
    slurm/config.yaml                      the configuration as submitted; that of an attempt may be smaller
    slurm/<job>.log                        what the job script printed
    attempts/<n>/attempt.json, job.log     an attempt; what its steps printed (`pbsd node` adds its own)
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from launcher.slurm.attempts import Attempt
from megatron_pbsd.errors import UsageError
from megatron_pbsd.observability.records import CONFIG, run_folder, write_atomically

ATTEMPT, LOG = "attempt.json", "job.log"
EXCLUDED = "excluded_nodes"
"""In a run's folder: names of nodes that are not to be used, one a line."""


def attempts_folder(run: Path) -> Path:
    return run / "attempts"


def job_folder(run: Path) -> Path:
    return run / "slurm"


def read_attempts(run: Path) -> list[Attempt]:
    """In their order. UsageError naming a record that cannot be read."""
    found = []
    for path in attempts_folder(run).glob(f"*/{ATTEMPT}"):
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            found.append(Attempt(**{key: tuple(v) if isinstance(v, list) else v for key, v in data.items()}))
        except (ValueError, TypeError) as error:
            raise UsageError(f"{path} is no record of an attempt: {error}") from None
    return sorted(found, key=lambda attempt: attempt.number)


def write_attempt(run: Path, attempt: Attempt) -> None:
    path = attempts_folder(run) / str(attempt.number) / ATTEMPT
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, [json.dumps(dataclasses.asdict(attempt))])


def attempt_log(run: Path, number: int) -> Path:
    return attempts_folder(run) / str(number) / LOG


def read_job(run: Path) -> dict[str, Any]:
    """What was recorded when it was submitted: at least `job`, its number. UsageError when it was not."""
    path = job_folder(run_folder(run)) / "job.json"
    if not path.is_file():
        raise UsageError(f"{run} was not submitted to Slurm: it has no slurm/job.json; `pbsd submit` makes it")
    return json.loads(path.read_text(encoding="utf-8"))


def submitted_config(run: Path) -> Path:
    """Of a run that was not submitted, its own."""
    path = job_folder(run) / CONFIG
    return path if path.is_file() else run / CONFIG


def excluded(run: Path) -> tuple[str, ...]:
    path = run / EXCLUDED
    return tuple(dict.fromkeys(path.read_text(encoding="utf-8").split())) if path.is_file() else ()



"""`pbsd submit`: from a configuration to a job that Slurm has accepted, recorded in the run's folder."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from launcher.overrides import load_config
from launcher.slurm import commands, fewer
from launcher.slurm.limits import problems, read_partitions
from launcher.slurm.records import excluded, job_folder
from launcher.slurm.script import render
from megatron_pbsd.config import RunConfig
from megatron_pbsd.errors import UsageError
from megatron_pbsd.observability.records import CONFIG, read_metrics, write_atomically

SCRIPT, JOB, CHANGES = "job.sh", "job.json", "changes.diff"
ENDED = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED",
         "REVOKED", "TIMEOUT", "")
"""States of jobs that do not run any more; '' for one that Slurm has forgotten."""


def seeds_of(text: str) -> list[int]:
    """'1-4,7%2' → 1, 2, 3, 4, 7. UsageError when it is not of that form.

    What follows % is how many may run at once; that is for Slurm.
    """
    found = []
    for part in text.partition("%")[0].split(","):
        if not (ends := re.fullmatch(r"(\d+)(?:-(\d+))?", part)):
            raise UsageError(f"--seeds {text} has {part!r}, expected numbers and ranges such as 1-4 or 1,5,9%2")
        found += range(int(ends[1]), int(ends[2] or ends[1]) + 1)
    if len(set(found)) < len(found) or not found:
        raise UsageError(f"--seeds {text} names {'a seed twice' if found else 'no seed'}")
    if text.count("%") and not re.fullmatch(r"[^%]+%[1-9]\d*", text):
        raise UsageError(f"--seeds {text}: after % comes how many may run at once, such as 1-4%2")
    return found


def with_seed(config: RunConfig, seed: int) -> RunConfig:
    return config.model_copy(update={"name": f"{config.name}_seed{seed}", "seed": seed})


def script_of(config: RunConfig, seeds: str) -> str:
    """What `--dry-run` prints and Slurm gets. Writes nothing."""
    pbsd = shlex.join([sys.executable, "-m", "launcher.cli"])
    return render(config, pbsd, str(Path.cwd()), seeds, excluded(config.folder))


def submit(path: str, overrides: Sequence[str], seeds: str = "", resume: bool = False) -> tuple[str, list[Path]]:
    """Submit a run, or one for every seed: the job's number and the runs' folders.

    UsageError with all that is wrong, before anything is written: the configuration, what the cluster cannot give, a
    run that is there already. Slurm itself is asked whether the job could start before it gets it.
    """
    commands.require(path)
    config = load_config(path, overrides)
    runs = [with_seed(config, seed) for seed in seeds_of(seeds)] if seeds else [config]
    if found := [*fewer.problems(config), *problems(config.cluster, read_partitions(commands.partitions())),
                 *(problem for run in runs if (problem := taken(run, resume)))]:
        raise UsageError("\n      ".join([f"{path} cannot be submitted:", *found]))
    text = script_of(config, seeds)
    commands.submit(text, test=True)
    git = git_state(Path(__file__).parent)
    diff = git.pop("diff", "")
    for run in runs:
        job_folder(run.folder).mkdir(parents=True, exist_ok=True)
        for folder in (run.folder, job_folder(run.folder)):
            write_atomically(folder / CONFIG,
                             [yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False).rstrip()])
        (job_folder(run.folder) / SCRIPT).write_text(text, encoding="utf-8")
        (job_folder(run.folder) / CHANGES).write_text(diff, encoding="utf-8")
    if seeds:
        config.folder.with_name(f"{config.folder.name}_seeds").mkdir(exist_ok=True)
    number = commands.submit(text)
    for run in runs:
        write_atomically(job_folder(run.folder) / JOB, [json.dumps({
            "job": f"{number}_{run.seed}" if seeds else number, "config": path, "overrides": list(overrides),
            "submitted": datetime.now(UTC).isoformat(timespec="seconds"), "workdir": str(Path.cwd()), "git": git,
        }, indent=2)])
    return number, [run.folder for run in runs]


def taken(run: RunConfig, resume: bool) -> str | None:
    """Why the run's folder cannot be used, if that is so."""
    folder = run.folder
    record = job_folder(folder) / JOB
    if record.is_file():
        number = json.loads(record.read_text(encoding="utf-8"))["job"]
        state = commands.job(number).get("JobState", "")
        if state not in ENDED:
            return (f"{folder} is being run by job {number}, which is {state.lower()}: end that with `pbsd cancel "
                    f"{folder}`, or choose another --name")
    if read_metrics(folder) and not resume:
        return (f"{folder} holds a run already: continue it with --resume, choose another --name, or remove the folder")
    return None


def git_state(code: Path) -> dict[str, Any]:
    """commit, branch, and diff: what is not committed. Empty when the code is in no repository."""
    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(code), *arguments], capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout if done.returncode == 0 else None

    if (commit := git("rev-parse", "HEAD")) is None:
        return {}
    return {"commit": commit.strip(), "branch": (git("rev-parse", "--abbrev-ref", "HEAD") or "").strip(),
            "clean": not (git("status", "--porcelain") or "").strip(), "diff": git("diff", "HEAD") or ""}


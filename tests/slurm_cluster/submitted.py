"""Runs that are submitted to a mini cluster through the command line, as a user submits them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from slurm_cluster.mini_cluster import MiniCluster

ROOT = Path(__file__).parents[2]
QUICKSTART = "configs/quickstart.yaml"
# The quickstart's model and task, in steps of a fraction of a second.
TINY = (
    "--learner.parallel.world_size", "1", "--learner.parallel.tp", "1", "--learner.updates_per_step", "1",
    "--rollout.engines", "1", "--rollout.prompts_per_step", "2", "--rollout.group_size", "2", "--rollout.max_turns",
    "2", "--rollout.max_turn_tokens", "16", "--evaluation.at_start", "false", "--evaluation.every", "0",
    "--evaluation.prompts", "4", "--checkpoint.every", "2", "--checkpoint.export_hf", "never")
INLINE = ("--runtime", "inline")
TWO_NODES = ("--cluster.nodes", "2", "--rollout.transport.kind", "collective")
DEADLINE_S = 240.0
COMPARED = ("reward/mean", "rollout/tokens", "loss/total", "grad_norm")


def pbsd(cluster: MiniCluster, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """The command on the login node."""
    return cluster.run(sys.executable, "-m", "launcher.cli", *arguments, check=check, cwd=ROOT)


@dataclass
class Submitted:
    cluster: MiniCluster
    folder: Path
    overrides: tuple[str, ...]

    @classmethod
    def submit(cls, cluster: MiniCluster, name: str, *overrides: str) -> Submitted:
        run = cls(cluster, cluster.shared / "runs" / name, (*TINY, *overrides))
        run._submit()
        return run

    def resubmit(self, *more: str) -> None:
        """Go on after it has ended."""
        self._submit("--resume", *more)

    def _submit(self, *more: str) -> None:
        pbsd(self.cluster, "submit", QUICKSTART, "--runs", str(self.folder.parent), "--name", self.folder.name,
             *self.overrides, *more)

    def status(self) -> dict:
        return json.loads(pbsd(self.cluster, "status", str(self.folder), "--json").stdout)

    def wait(self) -> dict:
        """Until it has ended, whatever came in between."""
        with self.attended():
            self.until(lambda: self.newest().get("exit_code") == 0 or self._has_ended(), "the run ended")
        return self.status()

    @contextmanager
    def attended(self):
        """Inside, somebody waits for the run with `pbsd status --wait`, so that requeued attempts begin at once."""
        command = [*self.cluster.entering("ctl"), sys.executable, "-m", "launcher.cli", "status", str(self.folder),
                   "--wait"]
        watcher = subprocess.Popen(command, cwd=ROOT, env=self.cluster.environment(), stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)
        try:
            yield
        finally:
            watcher.kill()
            watcher.wait()

    def cancel(self) -> None:
        pbsd(self.cluster, "cancel", str(self.folder), check=False)
        self.until(lambda: not self.cluster.run("squeue", "-h", "-n", self.folder.name).stdout.strip(),
                   "the job is gone")

    def rows(self) -> list[dict]:
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def step(self) -> int:
        rows = self.rows()
        return rows[-1]["step"] if rows else 0

    def attempts(self) -> list[dict]:
        files = sorted(self.folder.glob("attempts/*/attempt.json"), key=lambda path: int(path.parent.name))
        return [json.loads(path.read_text()) for path in files]

    def newest(self) -> dict:
        return (self.attempts() or [{}])[-1]

    def until(self, holds: Callable[[], bool], what: str) -> float:
        try:
            return self.cluster.until(holds, DEADLINE_S, what)
        except AssertionError as error:
            logs = [*self.folder.glob("slurm/*.log"), *self.folder.glob("attempts/*/job.log")]
            ends = [f"{log}:\n" + "\n".join(log.read_text(errors="replace").splitlines()[-12:]) for log in logs]
            raise AssertionError("\n".join([str(error), json.dumps(self.attempts(), indent=1), *ends])) from None

    def until_step(self, step: int) -> None:
        self.until(lambda: self.step() >= step, f"step {step} of {self.folder.name}")

    def recovered(self, number: int) -> float:
        """Wait until a later attempt than `number` has done a step that had not been done before it: when that was."""
        def is_beyond() -> bool:
            reached = [attempt["step"] for attempt in self.attempts() if attempt["number"] <= number]
            return self.newest()["number"] > number and self.step() > max(reached)

        self.until(is_beyond, f"a new step after attempt {number}")
        return time.monotonic()

    def _has_ended(self) -> bool:
        return self.status()["state"] not in ("running", "waiting")


class Alone:
    """The same run on this machine, without Slurm, beside what else goes on. A context manager."""

    def __init__(self, cluster: MiniCluster, name: str, *overrides: str):
        runs = cluster.shared / "runs"
        self.folder = runs / name
        self._process = subprocess.Popen(
            ["nice", sys.executable, "-m", "launcher.cli", "train", QUICKSTART, "--runs", str(runs), "--name", name,
             *TINY, *overrides], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def rows(self) -> list[dict]:
        """Once it is complete."""
        assert self._process.wait(DEADLINE_S) == 0
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").open()]

    def __enter__(self) -> Alone:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.terminate()
        self._process.wait()


def assert_same(rows: list[dict], others: list[dict]) -> None:
    """Every step is there once, in order, and is what it is in the other run."""
    assert [row["step"] for row in rows] == [row["step"] for row in others]
    for ours, theirs in zip(rows, others):
        for key in COMPARED:
            assert ours.get(key, 0.0) == pytest.approx(theirs.get(key, 0.0), rel=1e-4, abs=1e-6), (ours["step"], key)

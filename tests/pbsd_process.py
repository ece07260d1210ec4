"""Whole runs through the command line, as a user starts them."""

from __future__ import annotations

import json
import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
DEADLINE_S = 300
# A run small enough for tests that look at something else than learning.
SMALL = ("--rollout.prompts_per_step", "4", "--rollout.group_size", "4", "--evaluation.at_start", "false",
         "--evaluation.prompts", "8", "--learner.updates_per_step", "1")
INLINE = ("--runtime", "inline", "--learner.parallel.world_size", "1", "--learner.parallel.tp", "1")


@dataclass
class Run:
    """A `pbsd` process and the folder it writes to."""

    process: subprocess.Popen
    folder: Path
    deadline_s: float = DEADLINE_S

    def finish(self) -> tuple[int, str]:
        """(exit code, what it said on stderr)."""
        try:
            _, errors = self.process.communicate(timeout=self.deadline_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        return self.process.returncode, errors

    def succeed(self) -> list[dict]:
        code, errors = self.finish()
        assert code == 0, errors
        return self.rows()

    def rows(self) -> list[dict]:
        path = self.folder / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def wait_for_step(self, step: int) -> None:
        end = time.monotonic() + self.deadline_s
        while not any(row["step"] >= step for row in self.rows()):
            assert self.process.poll() is None, self.process.communicate()[1]
            assert time.monotonic() < end, f"step {step} did not come"
            time.sleep(0.1)

    def component(self, name: str) -> psutil.Process:
        """The process that writes the component's log."""
        log = str(self.folder / "logs" / f"{name}.log")
        for process in self.family():
            try:
                if os.readlink(f"/proc/{process.pid}/fd/1") == log:
                    return process
            except OSError:
                continue
        raise AssertionError(f"no process writes {log}")

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)


def none_left(processes: list[psutil.Process]) -> bool:
    """Whether all of `processes` end within a few seconds."""
    end = time.monotonic() + 15
    while (left := any(is_alive(process) for process in processes)) and time.monotonic() < end:
        time.sleep(0.05)
    return not left


def is_alive(process: psutil.Process) -> bool:
    """Orphans that nobody reaps, as in a container, are dead too."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False

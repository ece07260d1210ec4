"""Whole runs through `pbsd node` on machines of namespaces (machines.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import yaml
from machines import Machines
from pbsd_process import QUICKSTART, ROOT

from launcher.overrides import load_config

START_S, END_S = 300.0, 90.0


class Run:
    """A run's folder, and attempts at it on these machines."""

    def __init__(self, machines: Machines, names: list[str], folder: Path, *options: str,
                 source: Path = QUICKSTART):
        self.machines, self.names, self.folder = machines, names, folder
        config = load_config(source, [*options, "--runs", str(folder.parent), "--name", folder.name])
        folder.mkdir()
        (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
        self.members: dict[str, subprocess.Popen] = {}
        self.attempt = 0

    def start(self) -> None:
        self.attempt += 1
        for rank, name in enumerate(self.names):
            with (self.folder / f"{name}.{self.attempt}.out").open("w") as output:
                self.members[name] = self.machines.start(name, [
                    sys.executable, "-m", "launcher.cli", "node", str(self.folder), "--nodes", str(len(self.names)),
                    "--node-rank", str(rank), "--head", "node1"],
                    stdout=output, stderr=output, env={**os.environ, "PYTHONPATH": str(ROOT)})

    def ends(self, seconds: float = END_S) -> dict[str, int]:
        """Exit codes by machine, of those that are there."""
        end = time.monotonic() + seconds
        return {name: member.wait(timeout=max(0.1, end - time.monotonic())) for name, member in self.members.items()}

    def said(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.folder.glob(f"*.{self.attempt}.out")))

    def rows(self) -> list[dict]:
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def record(self) -> dict:
        return json.loads((self.folder / "attempts" / str(self.attempt) / "nodes.json").read_text())

    def go_on_for(self, steps: int) -> None:
        """Until so many steps more are done than when it began."""
        end, began = time.monotonic() + START_S, self.newest()
        while self.newest() < began + steps:
            assert time.monotonic() < end, self.said()
            assert all(member.poll() is None for member in self.members.values()), self.said()
            time.sleep(0.1)

    def newest(self) -> int:
        return max((row["step"] for row in self.rows()), default=0)


def left_of(machines: Machines) -> list[str]:
    """Processes of a run that are on the machines still."""
    return [f"{name}: {' '.join(psutil.Process(pid).cmdline())}" for name in machines.names
            for text in ("raylet", "gcs_server", "ray::", "launcher.cli") for pid in machines.processes(name, text)]

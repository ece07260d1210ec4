"""Processes of earlier attempts at a run that are still on this machine: those whose end nobody saw to."""

from __future__ import annotations

import os
from pathlib import Path

import psutil

MARK = "PBSD_NODE"
"""In the environment of everything that `pbsd node` starts: '<attempt>:<the run's folder>'."""
END_S = 10.0


def mark(run: Path, attempt: int) -> str:
    return f"{attempt}:{run.resolve()}"


def end_orphans(run: Path, attempt: int) -> list[int]:
    """End them all; their numbers. Those of `attempt` itself are spared: other members may be on this machine."""
    ours, folder = mark(run, attempt), f":{run.resolve()}"
    found = [process for process in psutil.process_iter()
             if (value := _mark_of(process)) and value.endswith(folder) and value != ours]
    for process in found:
        process.kill()
    psutil.wait_procs(found, timeout=END_S)
    return [process.pid for process in found]


def _mark_of(process: psutil.Process) -> str | None:
    try:
        return None if process.pid == os.getpid() else process.environ().get(MARK)
    except psutil.Error:
        return None

"""The quickstart, measured: how long, how much memory, how much it learned, and where the time went.

seconds          wall clock of `pbsd train`, start-up included
peak_rss_gb      largest memory of all its processes together (proportional set size)
em_first/last    exact match on held-out entities before and after, sampled at temperature 1
em_no_retriever  exact match of the final policy when the search tool returns nothing
phase_share      share of the training steps' time per phase
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launcher.overrides import load_config
from launcher.processes import PeakMemory
from megatron_pbsd.errors import PbsdError
from megatron_pbsd.observability.records import Row, read_metrics

CONFIG = Path("configs/quickstart.yaml")
PHASES = ("rollout", "reward", "log_probs", "train", "weights", "other")


def run(overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Train the quickstart with `overrides` in a folder of its own, which is removed again."""
    runs = tempfile.mkdtemp(prefix="pbsd-bench-")
    try:
        arguments = ["--runs", runs, "--name", "quickstart", *overrides]
        seconds, peak = _train(arguments)
        rows = read_metrics(Path(runs) / "quickstart")
        evaluated = [row["eval/exact_match"] for row in rows if "eval/exact_match" in row]
        return {
            "seconds": round(seconds, 1),
            "peak_rss_gb": round(peak / 1e9, 2),
            "em_first": evaluated[0],
            "em_last": evaluated[-1],
            "em_no_retriever": _without_retriever(arguments, Path(runs) / "quickstart" / "exported"),
            "phase_share": phase_share([row for row in rows if row["step"] > 0]),
        }
    finally:
        shutil.rmtree(runs, ignore_errors=True)


def _train(arguments: Sequence[str]) -> tuple[float, int]:
    started = time.perf_counter()
    command = [sys.executable, "-m", "launcher.cli", "train", str(CONFIG), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    memory = PeakMemory(lambda: process.pid)
    memory.start()
    _, errors = process.communicate()
    if process.returncode:
        raise PbsdError(f"{' '.join(command)} exited with {process.returncode}: {errors.strip()[-2000:]}")
    return time.perf_counter() - started, memory.stop()


def _without_retriever(arguments: Sequence[str], policy: Path) -> float:
    from megatron_pbsd.evaluate import evaluate

    config = load_config(CONFIG, [*arguments, "--environment.retriever", "none", "--model.path", str(policy)])
    return evaluate(config)["eval/exact_match"]


def phase_share(rows: Sequence[Row]) -> dict[str, float]:
    """Of the time of training steps without evaluation and checkpoints, which are not part of a step's work."""
    seconds = {phase: sum(row[f"time/{phase}_s"] for row in rows) for phase in PHASES}
    total = sum(seconds.values())
    return {phase: round(value / total, 4) for phase, value in seconds.items()}

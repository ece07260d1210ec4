"""What a run's folder holds, and how to read it back: metrics.jsonl, trajectories/, config.yaml."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_pbsd.errors import UsageError
from megatron_pbsd.trajectory import Trajectory

METRICS = "metrics.jsonl"
TRAJECTORIES = "trajectories"
CONFIG = "config.yaml"
TRACE = "trace.json"
REPORT = "report.html"

Row = dict[str, float]


@dataclass(frozen=True)
class RecordedTrajectory:
    """A trajectory and its text. `turns[k]` is (generated, observation)."""

    trajectory: Trajectory
    prompt: str
    privileged_prompt: str
    turns: tuple[tuple[str, str], ...]

    @property
    def solved(self) -> bool:
        """By the exact-match score where the environment gives one, by a positive reward elsewhere."""
        return self.trajectory.scores.get("exact_match", self.trajectory.reward or 0.0) > 0

    def to_json(self) -> dict[str, Any]:
        text = {"prompt": self.prompt, "privileged_prompt": self.privileged_prompt,
                "turns": [{"generated": generated, "observation": seen} for generated, seen in self.turns]}
        return {**self.trajectory.to_json(), "text": text}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> RecordedTrajectory:
        data = dict(data)
        text = data.pop("text")
        turns = tuple((turn["generated"], turn["observation"]) for turn in text["turns"])
        return cls(Trajectory.from_json(data), text["prompt"], text["privileged_prompt"], turns)


def run_folder(path: str | Path) -> Path:
    """`path` if it is a run's folder. UsageError naming the runs that are there instead."""
    folder = Path(path)
    if (folder / CONFIG).is_file():
        return folder
    parent = folder if folder.is_dir() else folder.parent
    runs = sorted(str(p.parent) for p in parent.glob(f"*/{CONFIG}"))
    raise UsageError(f"{folder} is not a run's folder: it has no {CONFIG}"
                     + (f"; runs there: {', '.join(runs)}" if runs else ""))


def read_metrics(folder: Path) -> list[Row]:
    """All rows, in the order of steps. A last line that a crash cut short is left out."""
    path = folder / METRICS
    if not path.exists():
        return []
    rows, lines = [], path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise UsageError(f"{path}:{number} is not JSON: {error}") from None
    return rows


def trajectory_file(folder: Path, step: int) -> Path:
    return folder / TRAJECTORIES / f"step_{step:06d}.jsonl"


def recorded_steps(folder: Path) -> list[int]:
    """Steps whose trajectories are kept, ascending."""
    names = (re.fullmatch(r"step_(\d+)\.jsonl", path.name) for path in (folder / TRAJECTORIES).glob("step_*"))
    return sorted(int(name[1]) for name in names if name)


def read_trajectories(folder: Path, step: int) -> list[RecordedTrajectory]:
    """UsageError when the step has none, naming the steps that have."""
    path = trajectory_file(folder, step)
    if not path.exists():
        steps = recorded_steps(folder)
        near = min(steps, key=lambda s: abs(s - step)) if steps else None
        raise UsageError(f"{folder} keeps no trajectories of step {step}"
                         + (f"; it keeps {len(steps)} steps from {steps[0]} to {steps[-1]}, the nearest is {near}"
                            if steps else ""))
    with path.open(encoding="utf-8") as lines:
        return [RecordedTrajectory.from_json(json.loads(line)) for line in lines]


def write_atomically(path: Path, lines: Iterable[str]) -> None:
    """The file appears whole or not at all."""
    partial = path.with_suffix(path.suffix + ".tmp")
    with partial.open("w", encoding="utf-8") as out:
        out.writelines(line + "\n" for line in lines)
        out.flush()
        os.fsync(out.fileno())
    os.replace(partial, path)

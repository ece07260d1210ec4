"""Finished trajectories on disk, one JSON object a line."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_pbsd.trajectory import Trajectory


class TrajectorySink:
    """Appends to `path`; what was written survives a crash of this process. `path` None keeps nothing."""

    def __init__(self, path: str | Path | None):
        self._file = None if path is None else open(path, "a", encoding="utf-8")

    def write(self, trajectory: Trajectory) -> None:
        if self._file is not None:
            self._file.write(json.dumps(trajectory.to_json(), separators=(",", ":")) + "\n")
            self._file.flush()

    def __enter__(self) -> TrajectorySink:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()


def read_trajectories(path: str | Path) -> list[Trajectory]:
    """All complete lines; a crash may have torn the last one, which is left out."""
    with open(path, encoding="utf-8") as file:
        return [Trajectory.from_json(json.loads(line)) for line in file if line.endswith("\n")]

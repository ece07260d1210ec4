"""Finished trajectories on disk, one JSON object a line."""

from __future__ import annotations

import json
import os
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


def taken_up(path: Path, origin: str) -> list[Trajectory]:
    """What a run that died had finished of the rollout that writes to `path`: nothing unless it was of this `origin`.

    origin: whatever decides how the trajectories turn out, in one line; kept beside the file for the next run. `path`
    is left with the trajectories that are returned.
    """
    beside = path.with_suffix(".origin")
    known = beside.read_text(encoding="utf-8") if beside.exists() else None
    found = read_trajectories(path) if known == origin and path.exists() else []
    if found:
        whole = path.with_suffix(".tmp")
        whole.unlink(missing_ok=True)
        with TrajectorySink(whole) as sink:
            for trajectory in found:
                sink.write(trajectory)
        os.replace(whole, path)
    else:
        path.unlink(missing_ok=True)
        beside.write_text(origin, encoding="utf-8")
    return found

"""An attempt at a run, as its machines leave it behind: RUN/attempts/<n>/.

    nodes.json              what became of it: phase, machines, exit code, error
    driver.log              what the driver printed
    ray-<rank>.log          what Ray printed on each machine
    head.json, node-<rank>  see meeting.py
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from megatron_pbsd.observability.records import write_atomically

ATTEMPTS, RECORD, NUMBER = "attempts", "nodes.json", "PBSD_ATTEMPT"
"""NUMBER: environment variable with the number that a job script has given to the attempt."""


@dataclass(frozen=True)
class Record:
    """phase: 'meeting', 'training' or 'ended'. nodes: names in the order of ranks. error: in a sentence, '' for none.
    began, ended: seconds since 1970."""

    number: int
    phase: str
    nodes: Sequence[str]
    began: float
    ended: float | None = None
    exit_code: int | None = None
    error: str = ""


class Attempt:
    """The head's: its number and folder, and its record, on disk whenever it changes."""

    def __init__(self, run: Path, environ: Mapping[str, str], nodes: Sequence[str]):
        self._run = run
        number = int(environ[NUMBER]) if environ.get(NUMBER) else newest(run) + 1
        self.folder = run / ATTEMPTS / str(number)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.record = Record(number, "meeting", tuple(nodes), time.time())
        self._write()

    @property
    def number(self) -> int:
        return self.record.number

    def training(self, nodes: Sequence[str]) -> None:
        self.record = replace(self.record, phase="training", nodes=tuple(nodes))
        self._write()

    def ended(self, code: int, error: str = "") -> None:
        self.record = replace(self.record, phase="ended", exit_code=code, error=error, ended=time.time())
        self._write()

    def superseded(self) -> bool:
        """Whether a later attempt has begun: this one's machines were given up."""
        return any(int(path.parent.name) > self.number for path in (self._run / ATTEMPTS).glob(f"*/{RECORD}"))

    def _write(self) -> None:
        write_atomically(self.folder / RECORD, [json.dumps(asdict(self.record))])


def newest(run: Path) -> int:
    return max((int(path.name) for path in (run / ATTEMPTS).glob("*") if path.name.isdigit()), default=0)

"""Chrome trace (chrome://tracing, ui.perfetto.dev): JSON array format, a complete JSON document after every event."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

DRIVER = "driver"


class Trace:
    """Appends events to `path`. Times are wall-clock microseconds, so that the parts of a resumed run line up."""

    def __init__(self, path: Path):
        events = _complete_events(path)
        if not events:
            events = [json.dumps({"name": "process_name", "ph": "M", "pid": 0, "args": {"name": DRIVER}})]
        self._lanes = {DRIVER: 0} | {
            event["args"]["name"]: event["tid"] for event in map(json.loads, events) if event["name"] == "thread_name"}
        rewritten = path.with_suffix(".tmp")
        rewritten.write_text("[\n" + ",\n".join(events) + "\n]\n", encoding="utf-8")
        os.replace(rewritten, path)
        self._file = path.open("r+b", buffering=0)

    @contextmanager
    def span(self, name: str, **arguments: Any) -> Iterator[None]:
        """Record the enclosed block, also when it raises."""
        started, clock = time.time_ns(), time.perf_counter_ns()
        try:
            yield
        finally:
            self.add(name, started, time.perf_counter_ns() - clock, **arguments)

    def add(self, name: str, start_ns: int, duration_ns: int, lane: str = DRIVER, **arguments: Any) -> None:
        """A span that began at `start_ns` (time.time_ns)."""
        if lane not in self._lanes:
            self._lanes[lane] = len(self._lanes)
            self._append({"name": "thread_name", "ph": "M", "pid": 0, "tid": self._lanes[lane], "args": {"name": lane}})
        self._append({"name": name, "ph": "X", "pid": 0, "tid": self._lanes[lane], "ts": start_ns / 1e3,
                      "dur": duration_ns / 1e3, "args": arguments})

    def _append(self, event: dict[str, Any]) -> None:
        # One write replaces the closing bracket, so that a crash between events leaves valid JSON.
        self._file.seek(-len(b"\n]\n"), os.SEEK_END)
        self._file.write(b",\n" + json.dumps(event).encode() + b"\n]\n")

    def close(self) -> None:
        self._file.close()


def _complete_events(path: Path) -> list[str]:
    """The events of an existing trace, one JSON text each; a half-written last line is dropped."""
    if not path.exists():
        return []
    events = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        text = line.strip().rstrip(",")
        try:
            if isinstance(json.loads(text), dict):
                events.append(text)
        except ValueError:
            continue
    return events

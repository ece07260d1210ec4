"""When engines had work and when trajectories ended, of one rollout."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from math import ceil

TAIL = 0.1
"""Part of the requests whose time alone is the tail."""
SAME_SPAN_NS = 20_000_000
"""Shorter gaps between two calls are round trips, not idleness."""


@dataclass(frozen=True)
class EngineSpan:
    """engine had work without interruption from start_ns to end_ns (time.time_ns). chunks: that ended in it."""

    engine: str
    start_ns: int
    end_ns: int
    chunks: int


class Activity:
    def __init__(self) -> None:
        self._spans: dict[str, list[EngineSpan]] = {}
        self._ends: list[float] = []

    def worked(self, engine: str, start_ns: int, chunks: int) -> None:
        """Until now."""
        now, spans = time.time_ns(), self._spans.setdefault(engine, [])
        if spans and start_ns - spans[-1].end_ns < SAME_SPAN_NS:
            spans[-1] = replace(spans[-1], end_ns=now, chunks=spans[-1].chunks + chunks)
        else:
            spans.append(EngineSpan(engine, start_ns, now, chunks))

    def ended(self) -> None:
        """A trajectory, just now."""
        self._ends.append(time.monotonic())

    @property
    def spans(self) -> tuple[EngineSpan, ...]:
        return tuple(span for spans in self._spans.values() for span in spans)

    @property
    def tail_seconds(self) -> float:
        """From when all but a tenth of the trajectories had ended until all had."""
        ends = self._ends
        return ends[-1] - ends[ceil(len(ends) * (1 - TAIL)) - 1] if ends else 0.0

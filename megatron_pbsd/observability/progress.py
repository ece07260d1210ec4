"""What a person sees while a run goes on: a live display on a terminal, one plain line per step elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from megatron_pbsd.observability.records import Row

REWARD, EXACT_MATCH, TOKENS_PER_S = "reward/mean", "eval/exact_match", "rollout/tokens_per_s"
BARS = "▁▂▃▄▅▆▇█"
RECENT = 10


class Progress(Protocol):
    def phase(self, name: str) -> None:
        """A phase of the current step began."""

    def rollout(self, finished: int, total: int) -> None:
        """Trajectories of the current rollout that are finished, of how many."""

    def step(self, row: Row) -> None:
        """A step is over; `row` is what was logged."""

    def close(self) -> None: ...


def make_progress(wanted: bool, name: str, steps: int, rows: Sequence[Row], console: Console | None = None) -> Progress:
    """`rows` are those of the earlier part of a resumed run; `steps` is the length of the whole run."""
    if not wanted:
        return Silent()
    console = console or Console(file=sys.stderr)
    return LiveProgress(name, steps, rows, console) if console.is_terminal else PlainProgress(steps, rows, console)


class Silent:
    def phase(self, name: str) -> None: ...
    def rollout(self, finished: int, total: int) -> None: ...
    def step(self, row: Row) -> None: ...
    def close(self) -> None: ...


class PlainProgress(Silent):
    """For log files."""

    def __init__(self, steps: int, rows: Sequence[Row], console: Console):
        self._steps, self._console = steps, console
        self._rows = list(rows)

    def step(self, row: Row) -> None:
        self._rows.append(row)
        parts = [f"step {position(row, self._steps)}"]
        for label, key, style in (("reward", REWARD, ".3f"), ("exact match", EXACT_MATCH, ".1%"),
                                  ("tokens/s", TOKENS_PER_S, ",.0f")):
            if key in row:
                parts.append(f"{label} {row[key]:{style}}")
        parts.append(f"{row['time/step_s']:.1f} s")
        parts.append(f"ETA {duration(eta(self._rows, self._steps))}")
        self._console.print("  ".join(parts), highlight=False, soft_wrap=True)


class LiveProgress:
    """A few lines that are redrawn in place: where the run is, how it learns, what it is doing."""

    def __init__(self, name: str, steps: int, rows: Sequence[Row], console: Console):
        self._name, self._steps, self._rows = name, steps, list(rows)
        self._phase, self._finished, self._total = "starting", 0, 0
        self._live = Live(console=console, get_renderable=self.render, refresh_per_second=4)
        self._live.start()

    def phase(self, name: str) -> None:
        self._phase, self._finished, self._total = name, 0, 0

    def rollout(self, finished: int, total: int) -> None:
        self._finished, self._total = finished, total

    def step(self, row: Row) -> None:
        self._rows.append(row)

    def close(self) -> None:
        self._phase = "done"
        self._live.stop()

    def render(self) -> RenderableType:
        done = self._rows[-1]["step"] if self._rows else 0
        head = Table.grid(padding=(0, 2))
        head.add_row(Text(self._name, style="bold"), ProgressBar(total=self._steps, completed=done, width=30),
                     f"step {done:.0f}/{self._steps}", f"ETA {duration(eta(self._rows, self._steps))}")
        facts = Table.grid(padding=(0, 2))
        facts.add_column(style="dim", min_width=12)
        rewards = series(self._rows, REWARD)
        if rewards:
            facts.add_row("reward", Text.assemble((f"{rewards[-1]:.3f}  ", "bold"), (sparkline(rewards), "green")))
        matches = series(self._rows, EXACT_MATCH)
        if matches:
            facts.add_row("exact match", f"{matches[-1]:.1%}  (first {matches[0]:.1%}, best {max(matches):.1%})")
        speeds = series(self._rows, TOKENS_PER_S)
        if speeds:
            facts.add_row("rollout", f"{speeds[-1]:,.0f} tokens/s")
        now = Table.grid(padding=(0, 1))
        doing: list[RenderableType] = [Text(self._phase, style="cyan")]
        if self._total:
            doing += [ProgressBar(total=self._total, completed=self._finished, width=20),
                      f"{self._finished}/{self._total} trajectories"]
        now.add_row(*doing)
        facts.add_row("now", now)
        return Group(head, facts)


def series(rows: Sequence[Row], key: str) -> list[float]:
    return [row[key] for row in rows if key in row]


def position(row: Row, steps: int) -> str:
    return f"{row['step']:.0f}/{steps}"


def eta(rows: Sequence[Row], steps: int) -> float | None:
    """Seconds to the end at the mean pace of the last steps; None before the first."""
    recent = [row["time/step_s"] for row in rows[-RECENT:]]
    return max(0.0, steps - rows[-1]["step"]) * sum(recent) / len(recent) if recent else None


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """Block characters from the lowest to the highest value; longer series are averaged down to `width`."""
    if len(values) > width:
        edges = [round(i * len(values) / width) for i in range(width + 1)]
        values = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(values), max(values)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((value - low) * scale)] for value in values)

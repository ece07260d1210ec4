"""`pbsd simulate`: reads a workload, and prints how policies compare on it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launcher.explain import validated
from launcher.sources import ConfigError, apply_overrides, read_yaml
from megatron_pbsd.simulation.workload import Workload


def load_workload(path: str | Path, overrides: Sequence[str] = ()) -> Workload:
    """ConfigError lists all problems."""
    settings = read_yaml(Path(path))
    apply_overrides(settings, overrides)
    workload, problems = validated(Workload, settings)
    if problems or workload is None:
        raise ConfigError(path, problems)
    return workload


def print_results(results: dict[str, Any]) -> None:
    rows = [("policy", "throughput", "published", "total s", "published", "tail s", "published", "tail cut", "idle",
             "gap closed", "preempted", "moved")]
    for name, row in results["policies"].items():
        published = row.get("published", {})
        rows.append((name, f"{row['throughput_rel']:.2f}", _number(published.get("throughput_rel"), ".2f"),
                     f"{row['total_s']:,.0f}", _number(published.get("total_s"), ",.0f"),
                     f"{row['tail_s']:,.0f}", _number(published.get("tail_s"), ",.0f"),
                     f"{1 - row['tail_rel']:.1%}", f"{row['idle']:.1%}",
                     _number(row.get("gap_closed"), ".1%"), f"{row['preemptions']:,.0f}", f"{row['moves']:,.0f}"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        first, *others = (text.ljust(width) if column == 0 else text.rjust(width)
                          for column, (text, width) in enumerate(zip(row, widths, strict=True)))
        print("  ".join((first, *others)))
    print(f"\n{results['workload']}, means of {results['seeds']} draws. No schedule without speculation is faster than "
          + ", ".join(f"{seconds:,.0f} s ({name.replace('_', ' ')})" for name, seconds in results["bounds"].items()))


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)

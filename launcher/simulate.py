"""`pbsd simulate`: reads a workload, and prints how policies compare on it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from launcher.explain import shown
from launcher.sources import ConfigError, Problem, apply_overrides, read_yaml
from megatron_pbsd.errors import did_you_mean
from megatron_pbsd.simulation.workload import Workload


def load_workload(path: str | Path, overrides: Sequence[str] = ()) -> Workload:
    """ConfigError lists all problems."""
    settings = read_yaml(Path(path))
    apply_overrides(settings, overrides)
    problems = list(settings.problems)
    try:
        workload = Workload.model_validate(settings.values)
    except ValidationError as error:
        for detail in error.errors():
            key = tuple(map(str, detail["loc"]))
            message = detail["msg"] if detail["type"] != "extra_forbidden" else (
                "unknown key" + did_you_mean(key[-1], _keys(key[:-1])))
            setting = ".".join(key) if detail["type"] == "missing" else f"{'.'.join(key)} = {shown(detail['input'])}"
            problems.append(Problem(".".join(key), setting, settings.source(key), message))
    if problems:
        raise ConfigError(path, problems)
    return workload


def _keys(path: Sequence[str]) -> list[str]:
    section: Any = Workload
    for key in path:
        section = section.model_fields[key].annotation if key in getattr(section, "model_fields", {}) else None
    return list(getattr(section, "model_fields", {}))


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

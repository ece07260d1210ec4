"""What the engines did under each policy, as one HTML file without any other: KV in use by engine and time, and how
many requests were still unfinished."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_pbsd import observability
from megatron_pbsd.observability.charts import BOTTOM, LEFT, TOP, Frame, number, percent, ticks
from megatron_pbsd.simulation.cluster import Outcome
from megatron_pbsd.simulation.cost import cost_model
from megatron_pbsd.simulation.engine import SimulatedEngine
from megatron_pbsd.simulation.experiment import Experiment

COLOURS = ("other", "reward", "checkpoint", "log_probs", "train", "ink", "weights", "evaluation", "rollout")
"""The report's, as CSS variables."""
WIDTH, COLUMNS, SHADES = 1160, 240, 8


def write_picture(experiment: Experiment, path: str | Path) -> None:
    """Of the first seed."""
    first = {name: outcomes[0] for name, outcomes in experiment.outcomes.items()}
    end = max(outcome.total_s for outcome in first.values())
    capacity = cost_model(experiment.workload).kv_tokens
    colours = {name: f"var(--{COLOURS[i % len(COLOURS)]})" for i, name in enumerate(first)}
    results = experiment.results()["policies"]
    cards = [_card("Unfinished requests", _legend(colours), _tail_curve(first, colours, end, 1.0)),
             _card("The last tenth of them", _legend(colours), _tail_curve(first, colours, end, 0.1))]
    for name, outcome in first.items():
        note = (f"{number(outcome.total_s)} s, of which the last tenth of the requests {number(outcome.tail_s)} s; "
                f"idle {percent(outcome.idle)}; throughput {results[name]['throughput_rel']:.2f}")
        cards.append(_card(name, f'<p class="note">{note}</p>', _engines(outcome, end, capacity)))
    assets = Path(observability.__file__).parent
    style, script = ((assets / file).read_text(encoding="utf-8") for file in ("report.css", "report.js"))
    title = html.escape(f"{experiment.workload.name}: simulated rollout")
    Path(path).write_text(
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{style}</style>'
        f'</head><body><main><h1>{title}</h1><p class="lead">{len(experiment.jobs[0]):,} requests on '
        f"{experiment.workload.engines} engines; each row is an engine, its colour the stronger "
        "the more of its KV memory is in use"
        f'</p>{"".join(cards)}</main><div id="tip"></div><script>{script}</script></body></html>', encoding="utf-8")


def _card(title: str, head: str, chart: str) -> str:
    return f'<h2>{html.escape(title)}</h2>{head}<div class="card">{chart}</div>'


def _legend(colours: dict[str, str]) -> str:
    return '<div class="legend">' + "".join(
        f'<span><span class="swatch" style="background:{colour}"></span>{html.escape(name)}</span>'
        for name, colour in colours.items()) + "</div>"


def _tail_curve(outcomes: dict[str, Outcome], colours: dict[str, str], end: float, most: float) -> str:
    """Up to `most` of the requests; a dot where the last is over."""
    frame = Frame(WIDTH, 300, (0.0, end), (0.0, most))
    times = np.linspace(0.0, end, COLUMNS + 1)
    tips: list[list[object]] = [[frame.px(time), f"{number(time)} s"] for time in times]
    parts = [f'<line class="grid" x1="{LEFT}" x2="{frame.px(end)}" y1="{frame.py(y)}" y2="{frame.py(y)}"/>'
             f'<text class="tick" x="{LEFT - 8}" y="{frame.py(y) + 3.5}" text-anchor="end">{percent(y)}</text>'
             for y in (0.0, most / 4, most / 2, most * 3 / 4, most)]
    for name, outcome in outcomes.items():
        finished = np.sort(np.array(list(outcome.finished.values())))
        left = 1 - np.searchsorted(finished, times, side="right") / len(finished)
        begins = finished[max(0, math.ceil((1 - most) * len(finished)) - 1)] if most < 1 else 0.0
        shown = [(x, y) for x, y in zip(times, left, strict=True) if begins < x < finished[-1]]
        corners = [(begins, most), *shown, (finished[-1], 0.0)]
        path = "M" + " L".join(f"{frame.px(x)} {frame.py(y)}" for x, y in corners)
        parts.append(f'<path style="fill:none;stroke:{colours[name]};stroke-width:2" d="{path}"/>'
                     f'<circle cx="{frame.px(finished[-1])}" cy="{frame.py(0.0)}" r="4" fill="{colours[name]}"/>')
        for tip, share in zip(tips, left, strict=True):
            tip.append(f"{name} {percent(share)}")
    return _figure("Unfinished requests", frame, parts, tips)


def kv_in_use(engine: SimulatedEngine, times: np.ndarray) -> np.ndarray:
    """Tokens of KV at each of `times`, between changes of the batch interpolated."""
    if not engine.batches:
        return np.zeros(len(times))
    changes, _, kv = map(np.array, zip(*engine.batches, strict=True))
    return np.interp(times, changes, kv, left=0.0, right=0.0)


def _engines(outcome: Outcome, end: float, capacity: int) -> str:
    row = max(4, min(14, 240 // len(outcome.engines)))
    frame = Frame(WIDTH, TOP + BOTTOM + row * len(outcome.engines), (0.0, end), (0.0, 1.0))
    times = (np.arange(COLUMNS) + 0.5) * end / COLUMNS
    used = np.array([kv_in_use(engine, times) for engine in outcome.engines]) / capacity
    levels = np.ceil(np.clip(used, 0.0, 1.0) * SHADES).astype(int)
    width = frame.px(times[1]) - frame.px(times[0])
    paths: list[list[str]] = [[] for _ in range(SHADES + 1)]
    for line, shades in enumerate(levels):
        edges = [0, *(np.flatnonzero(np.diff(shades)) + 1), COLUMNS]
        for start, stop in zip(edges, edges[1:], strict=False):  # noqa: RUF007 (an index, not a pair)
            x, long = LEFT + start * width, (stop - start) * width
            paths[shades[start]].append(f"M{x:.1f} {TOP + line * row}h{long:.1f}v{row - 1}h{-long:.1f}z")
    parts = [f'<path style="fill:var(--accent);fill-opacity:{shade / SHADES}" d="{"".join(path)}"/>'
             for shade, path in enumerate(paths) if shade and path]
    tail = frame.px(outcome.total_s - outcome.tail_s)
    bottom = frame.height - BOTTOM
    parts += [f'<text class="tick" x="{LEFT - 8}" y="{TOP + (line + 0.5) * row + 3.5:.1f}" text-anchor="end">{line}'
              "</text>" for line in (0, len(outcome.engines) - 1)]
    parts.append(f'<line x1="{tail}" x2="{tail}" y1="{TOP - 4}" y2="{bottom}" style="stroke:var(--bad-ink)"/>'
                 f'<text class="tick" x="{tail}" y="{TOP - 6}" text-anchor="middle">90% over</text>'
                 f'<text class="value" x="{frame.px(outcome.total_s) + 6}" y="{(TOP + bottom) / 2}">'
                 f'{number(outcome.total_s)} s</text>')
    tips = [[frame.px(time), f"{number(time)} s", f"KV in use {percent(share)}"]
            for time, share in zip(times, used.mean(axis=0), strict=True)]
    return _figure("KV in use by engine and time", frame, parts, tips)


def _figure(title: str, frame: Frame, parts: Sequence[str], tips: Sequence[Sequence[object]]) -> str:
    end = frame.x[1]
    axis = "".join(f'<text class="tick" x="{frame.px(mark)}" y="{frame.height - 9}" text-anchor="middle">'
                   f"{mark:,.0f} s</text>" for mark in ticks(0.0, end, 8) if mark <= end)
    data = html.escape(json.dumps(tips), quote=True)
    return (f'<svg class="chart" role="img" aria-label="{title}" viewBox="0 0 {frame.width} {frame.height}" '
            f'data-tips="{data}" data-bounds="{TOP},{frame.height - BOTTOM}">{"".join(parts)}{axis}</svg>')

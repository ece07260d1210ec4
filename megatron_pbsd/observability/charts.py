"""Charts as inline SVG, coloured by the page's CSS variables. Pure: numbers in, markup out.

Every chart carries the values under the pointer in `data-tips` ([[x, line, line, …], …]); report.js shows them.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Format = Callable[[float], str]
LEFT, RIGHT, TOP, BOTTOM = 48, 52, 14, 26
"""Margins (px) that hold the axes' labels and the last value."""


@dataclass(frozen=True)
class Line:
    """A curve. style: CSS class of the path. labels: indices of points that are marked with their value."""

    name: str
    points: Sequence[tuple[float, float]]
    style: str = "line"
    labels: Sequence[int] = ()
    dots: bool = False
    label_format: Format | None = None


@dataclass(frozen=True)
class Frame:
    """Maps values to pixels."""

    width: int
    height: int
    x: tuple[float, float]
    y: tuple[float, float]

    def px(self, value: float) -> float:
        low, high = self.x
        return round(LEFT + (self.width - LEFT - RIGHT) * ((value - low) / (high - low) if high > low else 0.5), 1)

    def py(self, value: float) -> float:
        low, high = self.y
        return round(self.height - BOTTOM - (self.height - TOP - BOTTOM) * (value - low) / (high - low), 1)


def number(value: float) -> str:
    """Three significant digits, a true minus sign, and k, M, G for large numbers."""
    if value < 0:
        return "−" + number(-value)
    if value == 0:
        return "0"
    if 0.001 <= value < 10_000:
        digits = max(0, 2 - math.floor(math.log10(value)))
        text = f"{value:,.{digits}f}"
        return text.rstrip("0").rstrip(".") if "." in text else text
    if value < 1:
        return f"{value:.2g}"
    power = min(3, int(math.log10(value) // 3))
    return f"{value / 1000 ** power:.3g}{' kMG'[power]}"


def percent(value: float) -> str:
    return f"{100 * value:.1f}%".replace(".0%", "%")


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round values that enclose [low, high], about `count` of them."""
    size = max(abs(low), abs(high))
    if size == 0:
        low, high = 0.0, 1.0
    elif high - low < 0.04 * size:  # the labels have three digits, which would all be the same
        low, high = (low + high) / 2 - 0.02 * size, (low + high) / 2 + 0.02 * size
    rough = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.15g}") for i in range(first, last + 1)]


def line_chart(title: str, lines: Sequence[Line], form: Format = number, from_zero: bool = False,
               width: int = 560, height: int = 250) -> str:
    """Curves over steps, which share the y axis. Empty text if there is nothing to draw."""
    points = [point for line in lines for point in line.points]
    if not points:
        return ""
    values = [y for _, y in points] + ([0.0] if from_zero else [])
    levels = ticks(min(values), max(values), 4 if height > 200 else 3)
    steps = [x for x, _ in points]
    frame = Frame(width, height, (min(steps), max(steps)), (levels[0], levels[-1]))
    parts = [_grid(frame, levels, form), _step_axis(frame)]
    for line in lines:
        path = "M" + " L".join(f"{frame.px(x)} {frame.py(y)}" for x, y in line.points)
        parts.append(f'<path class="{line.style}" d="{path}"/>')
        if line.dots or len(line.points) == 1:
            parts += [f'<circle class="{line.style}-dot" cx="{frame.px(x)}" cy="{frame.py(y)}" r="3.2"/>'
                      for x, y in line.points]
        parts += [_value_label(frame, line, index, line.label_format or form) for index in line.labels]
    tips: dict[float, list[str]] = {}
    for line in lines:
        for x, y in line.points:
            tips.setdefault(x, [f"step {x:g}"]).append(f"{line.name} {(line.label_format or form)(y)}")
    return _figure(title, frame, parts, [[frame.px(x), *tip] for x, tip in sorted(tips.items())])


def stacked_bars(title: str, steps: Sequence[float], layers: Sequence[tuple[str, str, Sequence[float]]],
                 form: Format, width: int = 1160, height: int = 240) -> str:
    """One bar per step. layers: (name, CSS colour, one value per step), bottom first."""
    totals = [sum(values) for values in zip(*(values for _, _, values in layers), strict=True)]
    levels = ticks(0.0, max(totals))
    half = (steps[1] - steps[0]) / 2 if len(steps) > 1 else 0.5
    frame = Frame(width, height, (steps[0] - half, steps[-1] + half), (0.0, levels[-1]))
    bar = max(1.0, (frame.px(steps[0] + half) - frame.px(steps[0] - half)) - (1 if len(steps) < 250 else 0))
    parts = [_grid(frame, levels, form), _step_axis(frame, steps[0], steps[-1])]
    base = [0.0] * len(steps)
    for name, colour, values in layers:
        rectangles = []
        for i, value in enumerate(values):
            top, bottom = frame.py(base[i] + value), frame.py(base[i])
            if bottom > top:
                x = frame.px(steps[i]) - bar / 2
                rectangles.append(f"M{x:.1f} {bottom}V{top}h{bar:.1f}V{bottom}z")
            base[i] += value
        parts.append(f'<path style="fill:{colour}" d="{"".join(rectangles)}"><title>{_text(name)}</title></path>')
    tips = [[frame.px(step), f"step {step:g}: {form(totals[i])}",
             *(f"{name} {form(values[i])}" for name, _, values in reversed(layers) if values[i] > 0)]
            for i, step in enumerate(steps)]
    return _figure(title, frame, parts, tips)


def histogram(title: str, samples: Sequence[tuple[str, str, Sequence[int]]], unit: str, width: int = 560,
              height: int = 220, most_bins: int = 24) -> str:
    """Shares of whole numbers, side by side. samples: (name, CSS colour, values), none of them empty."""
    low, high = min(min(v) for _, _, v in samples), max(max(v) for _, _, v in samples)
    size = max(1, math.ceil((high - low + 1) / most_bins))
    bins = (high - low) // size + 1
    shares = [[sum(1 for v in values if (v - low) // size == b) / len(values) for b in range(bins)]
              for _, _, values in samples]
    levels = ticks(0.0, max(max(share) for share in shares), 3)
    frame = Frame(width, height, (low - 0.5, low - 0.5 + bins * size), (0.0, levels[-1]))
    slot = frame.px(low - 0.5 + size) - frame.px(low - 0.5)
    bar = max(1.0, slot * 0.84 / len(samples))
    parts = [_grid(frame, levels, percent)]
    for s, (_, colour, _) in enumerate(samples):
        rectangles = []
        for b, share in enumerate(shares[s]):
            if share > 0:
                x = frame.px(low - 0.5 + b * size) + slot * 0.08 + s * bar
                rectangles.append(f"M{x:.1f} {frame.py(0)}V{frame.py(share)}h{bar:.1f}V{frame.py(0)}z")
        parts.append(f'<path style="fill:{colour}" d="{"".join(rectangles)}"/>')
    names = [f"{low + b * size}" if size == 1 else f"{low + b * size}–{low + (b + 1) * size - 1}" for b in range(bins)]
    shown = range(0, bins, max(1, math.ceil(bins * (7.0 * max(map(len, names)) + 8) / (width - LEFT - RIGHT))))
    centres = [frame.px(low - 0.5 + (b + 0.5) * size) for b in range(bins)]
    parts += [f'<text class="tick" x="{centres[b]}" y="{height - 9}" text-anchor="middle">{names[b]}</text>'
              for b in shown]
    tips = [[centres[b], f"{names[b]} {unit}",
             *(f"{name} {percent(shares[s][b])}" for s, (name, _, _) in enumerate(samples))] for b in range(bins)]
    return _figure(title, frame, parts, tips)


def _grid(frame: Frame, levels: Sequence[float], form: Format) -> str:
    parts = []
    for level in levels:
        y = frame.py(level)
        parts.append(f'<line class="{"base" if level == 0 else "grid"}" x1="{LEFT}" x2="{frame.width - RIGHT}" '
                     f'y1="{y}" y2="{y}"/>'
                     f'<text class="tick" x="{LEFT - 8}" y="{y + 3.5}" text-anchor="end">{form(level)}</text>')
    return "".join(parts)


def _step_axis(frame: Frame, first: float | None = None, last: float | None = None) -> str:
    low, high = frame.x[0] if first is None else first, frame.x[1] if last is None else last
    count = 6 if frame.width > 400 else 3
    marks = [t for t in ticks(low, high, count) if low <= t <= high and t == int(t)] if high > low else [low]
    y = frame.height - 9
    return "".join(f'<text class="tick" x="{frame.px(mark)}" y="{y}" text-anchor="middle">{mark:,.0f}</text>'
                   for mark in marks)


def _value_label(frame: Frame, line: Line, index: int, form: Format) -> str:
    (x, y), last = line.points[index], index == len(line.points) - 1
    at, down = frame.px(x), frame.py(y)
    if last:
        at, down, anchor = at + 7, down + 4, "start"
    elif index == 0:
        below = down + 18 < frame.height - BOTTOM
        down, anchor = down + (18 if below else -9), "start"
    else:  # beside the curve: above, and to the left of a rise or to the right of a fall
        down, anchor = down - 9, "end" if frame.py(line.points[index + 1][1]) <= down else "start"
    down += 26 if down < TOP - 3 else 0
    return f'<text class="value" x="{at:.1f}" y="{down:.1f}" text-anchor="{anchor}">{_text(form(y))}</text>'


def _figure(title: str, frame: Frame, parts: Sequence[str], tips: Sequence[Sequence[object]]) -> str:
    data = html.escape(json.dumps(tips), quote=True)
    return (f'<svg class="chart" role="img" aria-label="{_text(title)}" viewBox="0 0 {frame.width} {frame.height}" '
            f'data-tips="{data}" data-bounds="{TOP},{frame.height - BOTTOM}">{"".join(parts)}</svg>')


def _text(value: str) -> str:
    return html.escape(value, quote=True)

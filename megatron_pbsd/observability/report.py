"""report.html: what a run learned, where its time went and what its policy did, in one file without any other."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median

import yaml

from megatron_pbsd.config import RunConfig
from megatron_pbsd.errors import UsageError
from megatron_pbsd.observability.charts import Line, histogram, line_chart, number, percent, stacked_bars
from megatron_pbsd.observability.progress import EXACT_MATCH, REWARD, TOKENS_PER_S, duration
from megatron_pbsd.observability.records import (
    CONFIG,
    REPORT,
    RecordedTrajectory,
    Row,
    read_metrics,
    read_trajectories,
    recorded_steps,
    write_atomically,
)
from megatron_pbsd.observability.samples import evidence_limit, pick, scale, trajectory_card

PHASE_ORDER = ("rollout", "train", "log_probs", "weights", "reward", "evaluation", "checkpoint", "other")
EDGE_STEPS = 3
"""Trajectories of this many first and last recorded steps stand for 'early' and 'late'."""
MOST_BARS = 160
RECOVERED = ("recovered/weights_step", "recovered/optimizer_step")

Recorded = list[RecordedTrajectory]


def write_report(folder: Path) -> Path:
    """Build report.html from what the run's folder holds. UsageError when the run has no step yet."""
    rows = read_metrics(folder)
    if not rows:
        raise UsageError(f"{folder} has no metrics yet: a report needs at least one step")
    text = (folder / CONFIG).read_text(encoding="utf-8")
    config = RunConfig.model_validate(yaml.safe_load(text))
    steps = recorded_steps(folder)
    early_steps = steps[: min(EDGE_STEPS, len(steps) // 2)]
    late_steps = steps[max(len(early_steps), len(steps) - EDGE_STEPS):]
    early = [r for step in early_steps for r in read_trajectories(folder, step)]
    late = [r for step in late_steps for r in read_trajectories(folder, step)]
    periods = [(_period(steps_), found) for steps_, found in ((early_steps, early), (late_steps, late)) if found]
    sections = [_header(config), _recovered(rows), _tiles(rows, config), _learning(rows), _statistics(rows),
                _time(rows), _lengths(periods), _samples(periods),
                f'<details class="card" id="config"><summary>Configuration</summary><pre>{_text(text)}</pre></details>']
    assets = Path(__file__).parent
    page = (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{_text(config.name)}</title>'
            f'<style>{(assets / "report.css").read_text(encoding="utf-8")}</style></head><body><main>'
            f'{"".join(sections)}</main><div id="tip"></div>'
            f'<script>{(assets / "report.js").read_text(encoding="utf-8")}</script></body></html>')
    write_atomically(folder / REPORT, [page])
    return folder / REPORT


def _period(steps: Sequence[int]) -> str:
    if len(steps) == 1:
        return f"step {steps[0]}"
    return f"steps {steps[0]}–{steps[-1]}" if steps else ""


def _header(config: RunConfig) -> str:
    layout = config.learner.parallel
    ranks = f"{layout.world_size} learner ranks (tp {layout.tp}, pp {layout.pp}, dp {layout.dp})"
    parts = [config.algorithm.name.upper(), config.model.path, f"{config.steps} steps", ranks, f"seed {config.seed}"]
    if config.algorithm.name != "sft":
        parts.insert(3, f"{config.rollout.prompts_per_step} prompts × {config.rollout.group_size} trajectories")
    return f'<h1>{_text(config.name)}</h1><p class="lead">{" · ".join(map(_text, parts))}</p>'


def _recovered(rows: Sequence[Row]) -> str:
    """Steps that began with weights newer than the optimizer's state, because the learner had been lost."""
    weights, optimizer = RECOVERED
    notes = [f"Before step {row['step']}: weights of step {row[weights]:.0f} recovered from the engines, optimizer "
             f"state of step {row[optimizer]:.0f}." for row in rows if weights in row]
    return "".join(f'<p class="note">{note}</p>' for note in notes)


def _tiles(rows: Sequence[Row], config: RunConfig) -> str:
    tiles = []
    if rewards := _values(rows, REWARD):
        few = min(10, max(1, len(rewards) // 2))
        tiles.append(("Reward", number(fmean(rewards[-few:])),
                      f"mean of the last {few} step{'s' * (few > 1)}; the first {few}: {number(fmean(rewards[:few]))}"))
    if matches := _values(rows, EXACT_MATCH):
        tiles.append(("Exact match", percent(matches[-1]),
                      f"at the start {percent(matches[0])}, best {percent(max(matches))}"))
    if speeds := _values(rows, TOKENS_PER_S):
        tiles.append(("Rollout tokens/s", f"{median(speeds):,.0f}", f"median step; best {max(speeds):,.0f}"))
    times = _values(rows, "time/step_s")
    tiles.append(("Time per step", f"{number(median(times))} s", f"median; slowest {number(max(times))} s"))
    done = sum(1 for row in rows if REWARD in row or any(key.startswith("loss/") for key in row))
    tiles.append(("Steps", f"{done:,}", f"of {config.steps:,}, in {duration(sum(times))}"))
    return '<div class="tiles">' + "".join(
        f'<div class="card tile"><div class="label">{_text(label)}</div><div class="number">{_text(value)}</div>'
        f'<div class="detail">{_text(detail)}</div></div>' for label, value, detail in tiles) + "</div>"


def _learning(rows: Sequence[Row]) -> str:
    cards = []
    if rewards := _points(rows, REWARD):
        lines = _curve("reward", rewards, points_per_window=16)
        note = "Mean of the step's trajectories" + (f", and its moving {lines[1].name} steps" if len(lines) > 1 else "")
        cards.append(_card("Reward", note, line_chart("reward", lines, from_zero=True)))
    if matches := _points(rows, EXACT_MATCH):
        best = max(range(len(matches)), key=lambda i: matches[i][1])
        few = len(matches) <= 8
        labels = range(len(matches)) if few else dict.fromkeys([0, best, len(matches) - 1])
        line = Line("exact match", matches, labels=list(labels), dots=len(matches) <= 40)
        note = "Share of evaluation prompts answered exactly" + ("" if few else "; first, best and last are labelled")
        cards.append(_card("Evaluation", note, line_chart("exact match", [line], percent, from_zero=True)))
    return f'<h2>Learning</h2><div class="pair">{"".join(cards)}</div>' if cards else ""


def _statistics(rows: Sequence[Row]) -> str:
    """Every other metric as a small chart."""
    shown = {"step", REWARD, EXACT_MATCH, TOKENS_PER_S, *RECOVERED}
    keys = [k for k in dict.fromkeys(k for row in rows for k in row) if k not in shown and not k.startswith("time/")]
    cards = []
    for key in sorted(keys, key=_group_order):
        points = _points(rows, key)
        group, _, name = key.rpartition("/")
        title = f'<span class="of">{_text(group or "learner")}</span> {_text(name.replace("_", " "))}'
        chart = line_chart(key, _curve(name, points), width=290, height=140)
        cards.append(f'<div class="card"><h3>{title}</h3>{chart}</div>')
    note = "Every other metric, one value per step, long series with their moving mean; the last value is labelled."
    return f'<h2>Statistics</h2><p class="note">{note}</p><div class="many">{"".join(cards)}</div>' if cards else ""


def _group_order(key: str) -> int:
    """Credit first, then the loss and the optimizer, then the rest as it was logged."""
    group = key.rpartition("/")[0]
    order = ("credit", "loss", "", "reward", "eval", "rollout")
    return order.index(group) if group in order else len(order)


def _time(rows: Sequence[Row]) -> str:
    found = dict.fromkeys(k.removeprefix("time/").removesuffix("_s") for row in rows for k in row
                          if k.startswith("time/") and k != "time/step_s")
    phases = [p for p in (*PHASE_ORDER[:-1], *(p for p in found if p not in PHASE_ORDER), "other")
              if sum(row.get(f"time/{p}_s", 0.0) for row in rows) > 0]
    total = sum(_values(rows, "time/step_s"))
    if not phases or total <= 0:
        return ""
    chunk = -(-len(rows) // MOST_BARS)
    chunks = [rows[i:i + chunk] for i in range(0, len(rows), chunk)]
    layers = [(p, _colour(p), [fmean(r.get(f"time/{p}_s", 0.0) for r in part) for part in chunks]) for p in phases]
    bars = stacked_bars("time per step", [part[0]["step"] for part in chunks], layers, lambda v: f"{number(v)} s")
    legend = "".join(f'<span><i class="swatch" style="background:{_colour(p)}"></i>{_label(p)}</span>' for p in phases)
    lines = []
    for phase in phases:
        spent = sum(row.get(f"time/{phase}_s", 0.0) for row in rows)
        lines.append(f'<tr><td><i class="swatch" style="background:{_colour(phase)}"></i>{_label(phase)}</td>'
                     f'<td>{number(spent)} s</td><td>{percent(spent / total)}</td>'
                     f'<td>{number(spent / len(rows))} s</td><td class="bar"><div style="width:'
                     f'{100 * spent / total:.1f}%;background:{_colour(phase)}"></div></td></tr>')
    table = ('<table><tr><th>Phase</th><th>Total</th><th>Share</th><th>Per step</th><th></th></tr>'
             + "".join(lines) + "</table>")
    note = "Wall-clock seconds of the driver." + (f" A bar is the mean of {chunk} steps." if chunk > 1 else "")
    return (f'<h2>Time</h2><p class="note">{note}</p><div class="card"><div class="legend">{legend}</div>{bars}</div>'
            f'<div class="card" style="margin-top:14px;overflow-x:auto">{table}</div>')


def _lengths(periods: Sequence[tuple[str, Recorded]]) -> str:
    if not periods:
        return ""
    colours = ["var(--other)", "var(--accent)"][-len(periods):]
    cards = []
    for title, unit, measure in (("Generated tokens per trajectory", "tokens", lambda r: r.trajectory.generated),
                                 ("Turns per trajectory", "turns", lambda r: len(r.trajectory.turns))):
        samples = [(name, colour, [measure(r) for r in found])
                   for (name, found), colour in zip(periods, colours, strict=True)]
        legend = "".join(f'<span><i class="swatch" style="background:{colour}"></i>{name}: mean {fmean(v):.1f}</span>'
                         for name, colour, v in samples)
        cards.append(f'<div class="card"><h3>{title}</h3><div class="legend">{legend}</div>'
                     f'{histogram(title, samples, unit)}</div>')
    return ('<h2>Lengths</h2><p class="note">Share of trajectories, in the first and in the last recorded steps.</p>'
            f'<div class="pair">{"".join(cards)}</div>')


def _samples(periods: Sequence[tuple[str, Recorded]]) -> str:
    if not periods:
        return ""
    limit = evidence_limit([r for _, found in periods for r in found])
    columns = []
    for name, found in periods:
        cards = [trajectory_card(r, limit, open_=i == 0)
                 for solved in (True, False) for i, r in enumerate(pick(found, solved))]
        rate = fmean(r.solved for r in found)
        columns.append(f'<div><p class="group">{name}: {len(found)} trajectories, {percent(rate)} solved</p>'
                       f'{"".join(cards)}</div>')
    note = ("Solved ones first, then failed ones: the first of each kind that took several turns. "
            "Grey boxes are what the policy read but did not write.")
    if limit is not None:
        note += (" A turn's colour is its evidence: how much likelier the same policy finds its own words once it is "
                 "told the verified answer.")
    return (f'<h2>Trajectories</h2><p class="note">{note}</p>{scale(limit) if limit is not None else ""}'
            f'<div class="pair">{"".join(columns)}</div>')


def _card(title: str, note: str, chart: str) -> str:
    extra = f'<p class="note">{_text(note)}</p>' if note else ""
    return f'<div class="card"><h3>{_text(title)}</h3>{extra}{chart}</div>'


def _values(rows: Sequence[Row], key: str) -> list[float]:
    return [row[key] for row in rows if key in row]


def _points(rows: Sequence[Row], key: str) -> list[tuple[float, float]]:
    return [(row["step"], row[key]) for row in rows if key in row]


def _curve(name: str, points: Sequence[tuple[float, float]], points_per_window: int = 24) -> list[Line]:
    """The points, faint behind their moving mean if they are many; the end is labelled."""
    window = len(points) // points_per_window | 1
    if window == 1:
        return [Line(name, points, labels=[len(points) - 1], dots=len(points) < 12)]
    return [Line(name, points, "faint"),
            Line(f"mean over {window}", _smoothed(points, window), labels=[len(points) - 1])]


def _smoothed(points: Sequence[tuple[float, float]], window: int) -> list[tuple[float, float]]:
    """Centred moving mean over an odd window, cut off at the ends."""
    half = window // 2
    return [(x, fmean(y for _, y in points[max(0, i - half): i + half + 1])) for i, (x, _) in enumerate(points)]


def _colour(phase: str) -> str:
    return f"var(--{phase}, var(--faint))"


def _label(phase: str) -> str:
    return _text(phase.replace("_", " ").replace("log probs", "log-probs"))


def _text(value: str) -> str:
    return html.escape(value, quote=True)

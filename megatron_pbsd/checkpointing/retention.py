"""Which checkpoints of a run stay, and why. Pure."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_pbsd.config import BestConfig, CheckpointConfig


@dataclass(frozen=True)
class Candidate:
    """A complete checkpoint. metrics: of its step."""

    name: str
    step: int
    metrics: Mapping[str, float]


def reasons(candidates: Sequence[Candidate], policy: CheckpointConfig) -> dict[str, list[str]]:
    """Name → why the checkpoint stays; empty for those that go. `candidates`: in the order in which they were written.

    The newest ones, those at multiples of `keep_every`, and the best one stay; so the newest one does always.
    """
    why: dict[str, list[str]] = {candidate.name: [] for candidate in candidates}
    for candidate in candidates[-policy.keep :]:
        why[candidate.name].append("newest")
    for candidate in candidates:
        if policy.keep_every and candidate.step % policy.keep_every == 0:
            why[candidate.name].append(f"every {policy.keep_every}")
    if policy.best is not None and (first := best(candidates, policy.best)):
        why[first.name].append("best")
    return why


def best(candidates: Sequence[Candidate], asked: BestConfig) -> Candidate | None:
    """The one with the best value of the metric, the first of equals; None when none was measured."""
    measured = [c for c in candidates if math.isfinite(c.metrics.get(asked.metric, math.nan))]
    sign = 1 if asked.direction == "max" else -1
    return max(measured, key=lambda c: sign * c.metrics[asked.metric], default=None)


def unknown(asked: BestConfig, metrics: Mapping[str, float]) -> str | None:
    """What is wrong if `metrics`, all of a step, do not have the one that is asked for."""
    if asked.metric in metrics:
        return None
    near = difflib.get_close_matches(asked.metric, metrics, 1)
    return f"checkpoint.best.metric = {asked.metric!r} is no metric of this run" + (
        f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(sorted(metrics))}")

"""How long trajectories are, when some of them were not seen to end: the Kaplan-Meier estimate. Pure numpy."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class Seen(NamedTuple):
    """A trajectory was watched from its `start`-th generated token (0: from its beginning) to its `stop`-th, and was
    over then (`ended`) or not. Of its length that says: it is above `start`, and `stop` or above `stop`."""

    start: int
    stop: int
    ended: bool


@dataclass(frozen=True)
class Survival:
    """lengths: at which trajectories ended, ascending, int64 [k]. above: estimated share that is longer than each,
    float64 [k]. longest: that was seen of any."""

    lengths: np.ndarray
    above: np.ndarray
    longest: int

    def mean(self, limit: int) -> tuple[float, float]:
        """Bounds of the estimated mean length, the sum over l >= 0 of P(length > l). They differ where the longest were
        not seen to end: these count as `longest` (Efron 1967), or as `limit` (Gill 1980)."""
        steps = np.concatenate([[0], self.lengths, [self.longest]])
        shares = np.concatenate([[1.0], self.above])
        low = float(np.sum(shares * np.diff(steps)))
        return low, low + float(shares[-1]) * max(0, limit - self.longest)


def kaplan_meier(seen: Iterable[Seen]) -> Survival:
    """P(length > l) = product over t <= l of (1 - ended at t / watched at t), of those that were watched at t: begun
    before it, and not stopped before it (Kaplan and Meier 1958; with late entries, Turnbull 1976).

    It assumes that when a trajectory is no longer watched says nothing about how much longer it would have been.
    """
    rows = [row for row in seen if row.stop > row.start]
    starts, stops = np.sort([row.start for row in rows]), np.sort([row.stop for row in rows])
    lengths, ended = np.unique(np.array([row.stop for row in rows if row.ended], np.int64), return_counts=True)
    watched = np.searchsorted(starts, lengths, "left") - np.searchsorted(stops, lengths, "left")
    above = np.cumprod(1 - ended / watched)
    return Survival(lengths, above, int(stops[-1]) if rows else 0)

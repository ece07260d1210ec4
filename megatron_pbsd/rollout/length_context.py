"""What the lengths of finished requests say about those of their siblings. Pure, O(1) per event."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import exp, log
from statistics import fmean


@dataclass(slots=True)
class _Group:
    count: int = 0
    longest: int = 0
    reached: int = 0


class LengthContext:
    """Lengths are generated tokens.

    limit:  most tokens a request can have; what is assumed of a group about which nothing is known.
    prior:  group → longest length in an earlier epoch, for prompts seen before.
    """

    def __init__(self, limit: int, prior: Mapping[str, int] | None = None):
        self._limit, self._prior = limit, dict(prior or {})
        self._groups: dict[str, _Group] = {}
        self.calibration = Calibration()

    def _group(self, group_id: str) -> _Group:
        group = self._groups.get(group_id)
        if group is None:
            group = self._groups[group_id] = _Group()
        return group

    def estimate(self, group_id: str) -> int:
        """Seer's L̂: the longest finished length of the group; with none finished, what it was in an earlier epoch, or
        the limit. Never less than what a member has reached."""
        group = self._groups.get(group_id)
        if group is None:
            return min(self._prior.get(group_id, self._limit), self._limit)
        known = group.longest if group.count else min(self._prior.get(group_id, self._limit), self._limit)
        return max(known, group.reached)

    def known(self, group_id: str) -> bool:
        """Whether the estimate rests on a length, of this epoch or an earlier one."""
        group = self._groups.get(group_id)
        return group_id in self._prior or (group is not None and group.count > 0)

    def reached(self, group_id: str, tokens: int) -> bool:
        """A member has so many tokens and goes on. Returns whether that changed the estimate."""
        group, before = self._group(group_id), self.estimate(group_id)
        group.reached = max(group.reached, tokens)
        return self.estimate(group_id) != before

    def finished(self, group_id: str, tokens: int) -> bool:
        """A member is over. Returns whether that changed the estimate."""
        before = self.estimate(group_id)
        if self.known(group_id):
            self.calibration.add(before, tokens)
        group = self._group(group_id)
        group.count += 1
        group.longest = max(group.longest, tokens)
        return self.estimate(group_id) != before

    def next_prior(self) -> dict[str, int]:
        """What the next epoch may begin with: an earlier epoch's value where this one finished nothing."""
        return self._prior | {group_id: group.longest for group_id, group in self._groups.items() if group.count}


class Calibration:
    """Predicted against real lengths of requests whose group was known when they finished."""

    def __init__(self) -> None:
        self._log_ratios: list[float] = []

    def add(self, predicted: float, real: float) -> None:
        self._log_ratios.append(log(max(predicted, 1) / max(real, 1)))

    def metrics(self) -> dict[str, float]:
        """count; bias: geometric mean of predicted / real; error: that of the ratio, whichever way it goes; covered:
        share of requests no longer than predicted. Ratios are 1 where nothing was predicted."""
        ratios = self._log_ratios
        if not ratios:
            return {"count": 0, "bias": 1.0, "error": 1.0, "covered": 1.0}
        return {"count": len(ratios), "bias": exp(fmean(ratios)), "error": exp(fmean(map(abs, ratios))),
                "covered": fmean(ratio >= 0 for ratio in ratios)}

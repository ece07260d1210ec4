"""What the lengths of finished requests say about those of their siblings. Pure, O(1) per event."""

from __future__ import annotations

from collections.abc import Mapping
from math import exp, log
from statistics import fmean


class LengthContext:
    """Lengths are generated tokens.

    limit:  most tokens a request can have; what is assumed of a group about which nothing is known.
    prior:  group → its length in an earlier epoch, for prompts seen before.
    """

    def __init__(self, limit: int, prior: Mapping[str, int] | None = None):
        self._limit, self._prior = limit, dict(prior or {})
        self._longest: dict[str, int] = {}
        self.calibration = Calibration()

    def estimate(self, group_id: str) -> int:
        """Seer's L̂: the longest finished length of the group; with none finished, what it was in an earlier epoch, or
        the limit."""
        longest = self._longest.get(group_id)
        return min(self._prior.get(group_id, self._limit), self._limit) if longest is None else longest

    def known(self, group_id: str) -> bool:
        """Whether the estimate rests on a length, of this epoch or an earlier one."""
        return group_id in self._longest or group_id in self._prior

    def finished(self, group_id: str, tokens: int) -> bool:
        """A member is over. Returns whether that changed the estimate."""
        before = self.estimate(group_id)
        if self.known(group_id):
            self.calibration.add(before, tokens)
        self._longest[group_id] = max(self._longest.get(group_id, 0), tokens)
        return self.estimate(group_id) != before

    def next_prior(self) -> dict[str, int]:
        """What the next epoch may begin with: an earlier epoch's value where this one finished nothing."""
        return self._prior | self._longest


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

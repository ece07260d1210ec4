"""How alike the lengths of a group's members are, learned while they run.

One factor per group (a Gaussian copula): a member's length, brought to a standard normal by the distribution of all
lengths, is √ρ of its group's factor and √(1 − ρ) its own. That distribution is Kaplan and Meier's, so that nothing is
assumed of its form. ρ is the mean of its posterior over a grid, and members that still run count as longer than they
are.
"""

from __future__ import annotations

from math import erfc, log, sqrt
from statistics import NormalDist

import numpy as np

GROUPS = 512
"""So many, those that began first, are looked at, which bounds what an estimate costs."""
BLOCK = 32
"""Groups at a time: small arrays are made in memory that the process has already."""
BINS = 8
"""Of log lengths, per unit."""
GROWTH = 1.2
"""How much more has to have finished for ρ to be estimated anew."""
FIRST = 8
"""Finished requests that the first estimate needs."""
UNKNOWN = 0.5
"""ρ before that, the mean of what it may be."""
RHOS = np.array([0.02, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.96])
FACTORS, WEIGHTS = np.polynomial.hermite_e.hermegauss(24)
BOUNDS = np.linspace(-12, 36, 4801)
LOG_ABOVE = np.log([erfc(bound / sqrt(2)) / 2 for bound in BOUNDS])
"""Logarithm of a standard normal's chance to be above `BOUNDS`."""


class LengthCorrelation:
    """limit: most tokens of a request, which might have gone on there. share: ρ of an earlier rollout, which is taken
    for that of this one; None: there was none."""

    def __init__(self, limit: int, share: float | None = None):
        self._numbers: dict[str, int] = {}
        self._last, self._bins = log(limit), _bin(log(limit)) + 1
        # Lists: counting one is several times as fast as in an array.
        self._ended: list[list[int]] = []
        self._going: list[list[int]] = []
        self._count, self._due = 0, float(FIRST)
        self._groups = GROUPS if share is None else 0
        self.share = UNKNOWN if share is None else share
        """ρ: part of the variance that is between groups."""

    @property
    def weight(self) -> float:
        """Of what siblings were, in what is to be expected: 3ρ² - 2ρ³, steep in the middle, so that siblings which are
        nearly alike, or hardly, are taken for it."""
        return self.share * self.share * (3 - 2 * self.share)

    def moved(self, group_id: str, before: float, now: float) -> None:
        """A member that had come to log length `before` (0: not far) is at `now`, and goes on."""
        number = self._number(group_id)
        if number is not None:
            self._left(number, before)
            self._going[number][_bin(now)] += 1

    def finished(self, group_id: str, before: float, length: float) -> None:
        """One that had come to `before` is over at log length `length`."""
        number = self._number(group_id)
        if number is None:
            return
        self._left(number, before)
        (self._going if length >= self._last else self._ended)[number][_bin(length)] += 1
        self._count += 1
        if self._count >= self._due:
            self._due = self._count * GROWTH
            self.share = correlation(np.array(self._ended, dtype=np.float64), np.array(self._going, dtype=np.float64))

    def _number(self, group_id: str) -> int | None:
        """Of a group that is looked at."""
        number = self._numbers.get(group_id)
        if number is None and len(self._numbers) < self._groups:
            number = self._numbers[group_id] = len(self._numbers)
            self._ended.append([0] * self._bins)
            self._going.append([0] * self._bins)
        return number

    def _left(self, number: int, before: float) -> None:
        if before:
            self._going[number][_bin(before)] -= 1


def _bin(length: float) -> int:
    return int(BINS * length)


def correlation(ended: np.ndarray, going: np.ndarray) -> float:
    """Mean of ρ's posterior, all of `RHOS` being as likely before.

    ended, going: float64 [groups, bins], members by the bin that their length is in, or that they have come to. The
    likelihood of a group is the integral over its factor (Gauss and Hermite's) of the product over its members.
    """
    above = np.cumprod(1 - _hazard(ended.sum(0), going.sum(0)))
    least = 0.5 / (ended.sum() + 1)
    here, there = ended.any(0), going.any(0)
    at_end = _normal(((above + np.concatenate([[1.0], above[:-1]])) / 2)[here], least)
    beyond = _normal(above[there], least)
    shares = RHOS[:, None, None]
    own = np.sqrt(1 - shares)
    log_density = -((at_end - np.sqrt(shares) * FACTORS[:, None]) / own) ** 2 / 2 - np.log(own)
    log_above = np.interp((beyond - np.sqrt(shares) * FACTORS[:, None]) / own, BOUNDS, LOG_ABOVE)
    density, over = _by_bin(log_density), _by_bin(log_above)
    likelihood = np.concatenate([
        _log_likelihoods(ended[first : first + BLOCK, here] @ density + going[first : first + BLOCK, there] @ over)
        for first in range(0, len(ended), BLOCK)]).sum(0)
    posterior = np.exp(likelihood - likelihood.max())
    return float((posterior * RHOS).sum() / posterior.sum())


def _log_likelihoods(given: np.ndarray) -> np.ndarray:
    """Logarithms of groups' likelihoods: given the factor, [groups, RHOS · FACTORS] → [groups, RHOS]."""
    given = given.reshape(-1, len(RHOS), len(FACTORS))
    top = given.max(2)
    return np.log((np.exp(given - top[..., None]) * WEIGHTS).sum(2)) + top


def _by_bin(table: np.ndarray) -> np.ndarray:
    """[RHOS, FACTORS, bins] → [bins, RHOS · FACTORS], in memory too: a product with it takes a quarter of the time."""
    return np.ascontiguousarray(table.reshape(len(RHOS) * len(FACTORS), -1).T)


def _hazard(ended: np.ndarray, going: np.ndarray) -> np.ndarray:
    """By bin, the share of those that came to it that ended in it."""
    watched = np.cumsum((ended + going)[::-1])[::-1]
    return ended / np.maximum(watched, 1)


def _normal(above: np.ndarray, least: float) -> np.ndarray:
    """What a standard normal exceeds with these chances, held to [least, 1 - least]."""
    inverse = NormalDist().inv_cdf
    return np.array([-inverse(chance) for chance in np.clip(above, least, 1 - least)])

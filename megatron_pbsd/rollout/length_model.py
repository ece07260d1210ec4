"""How long a request will still be: a hierarchical model of lengths, learned while the rollout runs.

The logarithm of a length is normal around its group's mean, and the groups' means are normal around that of all. A
group's mean is estimated from the members that have finished and, since those that finish first are the short ones,
also from how far the others have come (censored observations, by expectation-maximisation).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import erfc, exp, log, pi, sqrt
from statistics import NormalDist

from megatron_pbsd.rollout.length_context import Calibration

PRIOR_WEIGHT = 20
"""Observations that the assumed variances count as, beside those of groups that have finished."""
WITHIN, BETWEEN = 0.6 ** 2, 0.8 ** 2
"""Assumed variances of log lengths within a group, and of groups' means."""
RISK = 0.07
"""A request is taken to be as long as this part of those like it exceed: being late with a long one costs more than
being early with a short one."""
LASTING = 0.5
"""One that has come so far goes on for at least this part of it, whatever its siblings did."""
NEWS = 0.2
"""How much farther (in log tokens) than its siblings a request has to come for its group to be estimated anew."""
SWEEPS = 3
STANDARD = NormalDist()


@dataclass(slots=True)
class _Group:
    finished: int = 0
    total: float = 0.0
    squares: float = 0.0
    running: dict[str, float] = field(default_factory=dict)
    estimate: tuple[float, float] | None = None
    farthest: float = 0.0


class LengthModel:
    """limit: most tokens of a request. prior: group → length in an earlier epoch, which counts as one observation."""

    def __init__(self, limit: int, prior: Mapping[str, int] | None = None):
        self._limit = limit
        self._groups: dict[str, _Group] = {}
        self._prior = {group: log(tokens) for group, tokens in (prior or {}).items()}
        self._within = _Variance(WITHIN)
        self._between = _Variance(BETWEEN)
        self._count, self._mean = 0, 0.0
        self.calibration = Calibration()

    def _group(self, group_id: str) -> _Group:
        group = self._groups.get(group_id)
        if group is None:
            group = self._groups[group_id] = _Group()
            if (earlier := self._prior.get(group_id)) is not None:
                group.finished, group.total, group.squares = 1, earlier, earlier * earlier
        return group

    def known(self, group_id: str) -> bool:
        return group_id in self._prior or ((group := self._groups.get(group_id)) is not None and group.finished > 0)

    def started(self, group_id: str, request_id: str) -> None:
        self._group(group_id).running.setdefault(request_id, 0.0)

    def reached(self, group_id: str, request_id: str, tokens: int) -> bool:
        """It has so many tokens and goes on. Returns whether that says something new about its siblings."""
        group = self._groups[group_id]
        group.running[request_id] = reached = log(tokens)
        surprising = group.estimate is not None and reached > max(group.estimate[0], group.farthest + NEWS)
        if surprising:
            group.estimate, group.farthest = None, reached
        return surprising

    def finished(self, group_id: str, request_id: str, tokens: int) -> bool:
        """It is over. Returns whether that says something new about its siblings: the first does, the second, the
        fourth and so on, as the n-th moves a mean by an n-th."""
        if self.known(group_id):
            self.calibration.add(self.remaining(group_id, 0), tokens)
        group, length = self._group(group_id), log(max(tokens, 1))
        group.running.pop(request_id, None)
        group.finished += 1
        group.total += length
        group.squares += length * length
        group.estimate = None
        self._count += 1
        self._mean += (length - self._mean) / self._count
        if not group.running and group.finished > 1:
            mean = group.total / group.finished
            spread = max(0.0, group.squares - group.total * mean)
            self._within.add(spread, group.finished - 1)
            self._between.add((mean - self._mean) ** 2, 1)
        return group.finished & (group.finished - 1) == 0

    def remaining(self, group_id: str, tokens: int) -> float:
        """Tokens a member that has so many is likely to still need at most; of a group about which nothing is known,
        all that the limit allows."""
        room = self._limit - tokens
        if not self.known(group_id):
            return room
        group = self._group(group_id)
        if group.estimate is None:
            group.estimate = self._estimate(group)
        mean, deviation = group.estimate
        longer = RISK
        if tokens:
            longer *= erfc((log(tokens) - mean) / (deviation * sqrt(2))) / 2
        if longer < 1e-12:
            return min(LASTING * tokens, room)
        total = exp(min(mean - deviation * STANDARD.inv_cdf(longer), 50.0))
        return min(max(total - tokens, LASTING * tokens), room)

    def _estimate(self, group: _Group) -> tuple[float, float]:
        """Mean and standard deviation of the log length of one more member."""
        within, between = self._within.value, self._between.value
        population = self._mean if self._count else group.total / group.finished
        deviation = sqrt(within)

        def mean(count: int, total: float) -> float:
            return (population / between + total / within) / (1 / between + count / within)

        middle = mean(group.finished, group.total)
        for _ in range(SWEEPS):
            telling = [x for x in group.running.values() if x > middle - deviation]
            if not telling:
                break
            expected = sum(_mean_above(x, middle, deviation) for x in telling)
            middle = mean(group.finished + len(telling), group.total + expected)
        return middle, sqrt(within + 1 / (1 / between + group.finished / within))


class _Variance:
    """A mean of squares that begins as an assumption."""

    def __init__(self, assumed: float):
        self._sum, self._count = assumed * PRIOR_WEIGHT, PRIOR_WEIGHT

    def add(self, squares: float, count: int) -> None:
        self._sum += squares
        self._count += count

    @property
    def value(self) -> float:
        return max(self._sum / self._count, 1e-4)


def _mean_above(bound: float, mean: float, deviation: float) -> float:
    """Of a normal variable, given that it is above a bound."""
    z = (bound - mean) / deviation
    if z > 5:
        return bound + deviation / z
    return mean + deviation * sqrt(2 / pi) * exp(-z * z / 2) / erfc(z / sqrt(2))

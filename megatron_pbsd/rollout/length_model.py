"""How long a request will still be: a hierarchical model of lengths, learned while the rollout runs.

The logarithm of a length is normal around its group's mean, and the groups' means are normal around that of all. Those
that finish first are the short ones, so that both are estimated also from how far the others have come (censored
observations, by expectation-maximisation).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import erfc, exp, log, pi, sqrt
from statistics import NormalDist

from megatron_pbsd.rollout.length_context import Calibration
from megatron_pbsd.rollout.length_correlation import LengthCorrelation

PRIOR_WEIGHT = 20
"""Observations that the assumed variances count as."""
WITHIN, BETWEEN = 0.6 ** 2, 0.8 ** 2
"""Assumed variances of log lengths within a group, and of groups' means."""
RISK = 0.07
"""The length that so many of those like it exceed is what a request will likely come to."""
LASTING = 0.5
"""One that has come so far goes on for at least this part of it, whatever its siblings did."""
NEWS = 0.2
"""How much farther (in log tokens) than its siblings a request has to come for its group to be estimated anew."""
GROWTH = 1.1
"""How much more has to have finished for the population to be estimated anew, which so costs O(1) per request."""
TELLING = 0.3
"""Part of the requests begun that has to have finished before the others' progress counts: from the shortest alone,
how long the longest are cannot be told. Until then the mean is that of those that have."""
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
    """limit: most tokens of a request. prior: group → length in an earlier epoch, which counts as one observation.
    share: part of the variance of log lengths that was between groups in an earlier rollout; None: there was none.

    What is predicted is the mean of two lengths: that which few like it exceed, and that which one of all requests of
    the rollout exceeds, because it ends with the last of them, and being late with a long one costs more than being
    early with many short ones. Of a group with an earlier answer it is the first alone: enough is known of it.
    """

    def __init__(self, limit: int, prior: Mapping[str, int] | None = None, share: float | None = None):
        self._limit = limit
        self._groups: dict[str, _Group] = {}
        self._prior = {group: log(tokens) for group, tokens in (prior or {}).items()}
        self._requests = 1
        self._population = _Population(log(limit))
        for earlier in self._prior.values():
            self._population.finished(0.0, earlier)
        self._within, self._within_count = WITHIN * PRIOR_WEIGHT, PRIOR_WEIGHT
        self.correlation = LengthCorrelation(limit, share)
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

    def submitted(self) -> None:
        """There is one more request."""
        self._requests += 1

    def started(self, group_id: str, request_id: str) -> None:
        self._group(group_id).running.setdefault(request_id, 0.0)

    def reached(self, group_id: str, request_id: str, tokens: int) -> bool:
        """It has so many tokens and goes on. Returns whether that says something new about its siblings."""
        group, reached = self._groups[group_id], log(tokens)
        before = group.running.get(request_id, 0.0)
        self._population.reached(before, reached)
        self.correlation.moved(group_id, before, reached)
        group.running[request_id] = reached
        surprising = group.estimate is not None and reached > max(group.estimate[0], group.farthest + NEWS)
        if surprising:
            group.estimate, group.farthest = None, reached
        return surprising

    def finished(self, group_id: str, request_id: str, tokens: int) -> bool:
        """It is over. Returns whether that says something new about its siblings: the first does, the second, the
        fourth and so on, as the n-th moves a mean by an n-th."""
        group, length = self._group(group_id), log(max(tokens, 1))
        if self.known(group_id):
            self._calibrate(group, tokens)
        before = group.running.pop(request_id, 0.0)
        self._population.finished(before, length)
        self.correlation.finished(group_id, before, length)
        group.finished += 1
        group.total += length
        group.squares += length * length
        group.estimate = None
        if not group.running and group.finished > 1:
            self._within += max(0.0, group.squares - group.total ** 2 / group.finished)
            self._within_count += group.finished - 1
        return group.finished & (group.finished - 1) == 0

    def _calibrate(self, group: _Group, tokens: int) -> None:
        mean, _ = self._estimated(group)
        self.calibration.add(min(exp(min(mean, 50.0)), self._limit), tokens)

    def _estimated(self, group: _Group) -> tuple[float, float]:
        if group.estimate is None:
            group.estimate = self._estimate(group)
        return group.estimate

    def remaining(self, group_id: str, tokens: int) -> float:
        """Tokens a member that has so many is likely to still need at most; of a group about which nothing is known,
        all that the limit allows."""
        room = self._limit - tokens
        if not self.known(group_id):
            return room
        mean, deviation = self._estimated(self._group(group_id))
        beyond = erfc((log(tokens) - mean) / (deviation * sqrt(2))) / 2 if tokens else 1.0
        likely = self._exceeded(RISK * beyond, mean, deviation, tokens)
        if likely >= room or group_id in self._prior:
            return likely
        return (likely + self._exceeded(min(RISK, 1 / self._requests) * beyond, mean, deviation, tokens)) / 2

    def urgency(self, group_id: str, tokens: int) -> float:
        """What to rank by: the likely remaining length as far as siblings are alike, and as far as they are not, all
        that the limit leaves, under which those that have least go first. Who outlives those is long."""
        room = self._limit - tokens
        if not self.known(group_id):
            return room
        weight = self.correlation.weight
        return weight * self.remaining(group_id, tokens) + (1 - weight) * room

    def _exceeded(self, chance: float, mean: float, deviation: float, tokens: int) -> float:
        """Tokens beyond those it has up to the length that is exceeded with this chance."""
        least, room = LASTING * tokens, self._limit - tokens
        if chance < 1e-12:
            return min(least, room)
        total = exp(min(mean - deviation * STANDARD.inv_cdf(chance), 50.0))
        return min(max(total - tokens, least), room)

    @property
    def within(self) -> float:
        """Variance of log lengths within a group."""
        return max(self._within / self._within_count, 1e-4)

    @property
    def between(self) -> float:
        """Variance of groups' means: what of all variance is not within groups."""
        return max(self._population.variance - self.within, 1e-3)

    def _estimate(self, group: _Group) -> tuple[float, float]:
        """Mean and standard deviation of the log length of one more member."""
        within, between, population = self.within, self.between, self._population.mean
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


class _Population:
    """Mean and variance of all log lengths: normal, those still running known to be longer than they are (Tobit's
    model, by expectation-maximisation). Counts are kept in bins of an eighth."""

    def __init__(self, limit: float):
        self._limit = limit
        self._ended: Counter[int] = Counter()
        self._going: Counter[int] = Counter()
        self._count, self._due = 0, 1.0
        self.mean, self.variance = limit, WITHIN + BETWEEN

    def reached(self, before: float, now: float) -> None:
        if before:
            self._going[int(8 * before)] -= 1
        if now:
            self._going[int(8 * now)] += 1

    def finished(self, reached: float, length: float) -> None:
        """At the limit it might have gone on."""
        if reached:
            self._going[int(8 * reached)] -= 1
        (self._going if length >= self._limit else self._ended)[int(8 * length)] += 1
        self._count += 1
        if self._count >= self._due:
            self._due = self._count * GROWTH
            self._estimate()

    def _estimate(self) -> None:
        """Twenty rounds: each estimate begins with the last."""
        ended = [((bin_ + 0.5) / 8, count) for bin_, count in self._ended.items()]
        going = [((bin_ + 0.5) / 8, count) for bin_, count in self._going.items() if count > 0]
        over = sum(count for _, count in ended)
        weight = over + sum(count for _, count in going)
        if over < TELLING * weight:
            self.mean = sum(x * count for x, count in ended) / over if over else self._limit
            return
        for _ in range(20):
            deviation = sqrt(self.variance)
            above = [(_mean_above(x, self.mean, deviation), x, count) for x, count in going]
            mean = (sum(x * count for x, count in ended) + sum(m * count for m, _, count in above)) / weight
            # E[(y - mean)²] of a normal y above x, from its mean m above x: variance + (m - mean)(x - mean)
            squares = sum((x - mean) ** 2 * count for x, count in ended) + sum(
                (self.variance + (m - self.mean) * (x - self.mean) + (self.mean - mean) * (2 * m - self.mean - mean))
                * count for m, x, count in above)
            self.mean = mean
            self.variance = (squares + (WITHIN + BETWEEN) * PRIOR_WEIGHT) / (weight + PRIOR_WEIGHT)


def _mean_above(bound: float, mean: float, deviation: float) -> float:
    """Of a normal variable, given that it is above a bound."""
    z = (bound - mean) / deviation
    if z > 5:
        return bound + deviation / z
    return mean + deviation * sqrt(2 / pi) * exp(-z * z / 2) / erfc(z / sqrt(2))

"""How long the answers to a prompt were when it was asked before, and how alike those to one prompt are: what length
contexts and models begin with."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import exp, log


@dataclass(slots=True)
class _Lengths:
    count: int = 0
    log_total: float = 0.0
    log_squares: float = 0.0
    longest: int = 0

    @property
    def mean(self) -> float:
        return self.log_total / self.count

    @property
    def scatter(self) -> float:
        """Sum of squared deviations from the mean."""
        return max(0.0, self.log_squares - self.count * self.mean ** 2)


class LengthHistory:
    """By task, lengths in generated tokens of the rollout in which it was asked last. It lives as long as its owner."""

    def __init__(self) -> None:
        self._lengths: dict[str, _Lengths] = {}

    def asked(self, task_id: str, lengths: Iterable[int]) -> None:
        """Takes the place of what was known of the task: the policy that answers changes."""
        known = _Lengths()
        for tokens in lengths:
            length = log(max(tokens, 1))
            known.count += 1
            known.log_total += length
            known.log_squares += length * length
            known.longest = max(known.longest, tokens)
        if known.count:
            self._lengths[task_id] = known

    def longest(self, task_id: str) -> int | None:
        """None: never asked."""
        known = self._lengths.get(task_id)
        return None if known is None else known.longest

    def typical(self, task_id: str) -> int | None:
        """Geometric mean, at least 1; None: never asked."""
        known = self._lengths.get(task_id)
        return None if known is None else max(1, round(exp(known.mean)))

    @property
    def share(self) -> float | None:
        """Part of the variance of log lengths that is between tasks: the intraclass correlation, by analysis of
        variance (Donner 1986, ICC(1)), not below 0. None: too little is known."""
        tasks = list(self._lengths.values())
        total = sum(task.count for task in tasks)
        if len(tasks) < 2 or total == len(tasks):
            return None
        mean = sum(task.log_total for task in tasks) / total
        between = sum(task.count * (task.mean - mean) ** 2 for task in tasks) / (len(tasks) - 1)
        within = sum(task.scatter for task in tasks) / (total - len(tasks))
        members = (total - sum(task.count ** 2 for task in tasks) / total) / (len(tasks) - 1)
        excess = max(0.0, (between - within) / members)
        return excess / (excess + within) if excess + within > 0 else None

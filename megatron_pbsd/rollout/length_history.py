"""How long the answers to a prompt were when it was asked before: the prior of length contexts, across epochs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import exp, log


@dataclass(slots=True)
class _Lengths:
    count: int = 0
    log_total: float = 0.0
    longest: int = 0


class LengthHistory:
    """By task, lengths in generated tokens of the rollout in which it was asked last. It lives as long as its owner."""

    def __init__(self) -> None:
        self._lengths: dict[str, _Lengths] = {}

    def asked(self, task_id: str, lengths: Iterable[int]) -> None:
        """Takes the place of what was known of the task: the policy that answers changes."""
        known = _Lengths()
        for tokens in lengths:
            known.count += 1
            known.log_total += log(max(tokens, 1))
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
        return None if known is None else max(1, round(exp(known.log_total / known.count)))

"""What an algorithm sees and what it returns: plain arrays in, credit per generated token out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class Outcome:
    """One trajectory as credit assignment sees it. n = number of generated tokens; observations are not in here.

    turn_index:   int64 [n], turn of each generated token, non-decreasing from 0.
    answer_mask:  bool [n], inside the final answer's text.
    student:      float32 [n], log-prob under the policy before the update (nats).
    teacher:      float32 [n], the same tokens under the privileged prompt; None if no teacher pass was made.
    """

    group_id: str
    reward: float
    turn_index: np.ndarray
    answer_mask: np.ndarray
    student: np.ndarray
    teacher: np.ndarray | None = None

    @property
    def turns(self) -> int:
        return int(self.turn_index[-1]) + 1 if len(self.turn_index) else 0


@dataclass(frozen=True)
class Credit:
    """advantages: float32 [n] per trajectory. evidence: float64 [turns] per trajectory, if computed (nats)."""

    advantages: list[np.ndarray]
    evidence: list[np.ndarray] | None = None
    metrics: dict[str, float] = field(default_factory=dict)


class Algorithm(Protocol):
    needs_teacher: bool
    """Whether the learner must score the trajectories under the privileged prompt as well."""

    def assign(self, outcomes: Sequence[Outcome]) -> Credit:
        """Credit for every generated token of every trajectory, in the order given."""

"""What an algorithm sees and what it returns: plain arrays in, credit per generated token out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

Need = Literal["student", "teacher", "reference", "values"]


@dataclass(frozen=True)
class Outcome:
    """One trajectory as credit assignment sees it. n = number of generated tokens; observations are not in here.

    turn_index:   int64 [n], turn of each generated token, non-decreasing from 0.
    answer_mask:  bool [n], inside the final answer's text.

    What needs a forward pass is None unless the algorithm `needs` it:

    student:      float32 [n], log-prob under the policy before the update (nats).
    teacher:      float32 [n], the same tokens under the privileged prompt.
    reference:    float32 [n], under the model that the run started from.
    values:       float32 [n], the value head's estimate before each token.
    """

    group_id: str
    reward: float
    turn_index: np.ndarray
    answer_mask: np.ndarray
    student: np.ndarray | None = None
    teacher: np.ndarray | None = None
    reference: np.ndarray | None = None
    values: np.ndarray | None = None

    def given(self, need: Need) -> np.ndarray:
        """float64 [n]. ValueError when the algorithm did not list it in its `needs`."""
        if (values := getattr(self, need)) is None:
            raise ValueError(f"the outcome has no {need!r}; the algorithm must list it in `needs`")
        return values.astype(np.float64)

    @property
    def tokens(self) -> int:
        return len(self.turn_index)

    @property
    def turns(self) -> int:
        return int(self.turn_index[-1]) + 1 if self.tokens else 0


@dataclass(frozen=True)
class Credit:
    """advantages: float32 [n] per trajectory. evidence: float64 [turns] per trajectory, if computed (nats).
    returns: float32 [n] per trajectory, what the value head should have estimated, if there is one."""

    advantages: list[np.ndarray]
    evidence: list[np.ndarray] | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    returns: list[np.ndarray] | None = None


class Algorithm(ABC):
    """From outcomes to credit."""

    needs: frozenset[Need] = frozenset()
    """What `assign` reads of an outcome that takes a forward pass before the update."""
    ends_in_loss: bool = False
    """Whether on exactly on-policy data `begin`, and then a loss that has the student's log-probs anyway, do together
    what `assign` does. The student's pass is then saved, and `assign` is asked after the update, for the record."""

    @abstractmethod
    def assign(self, outcomes: Sequence[Outcome]) -> Credit:
        """Credit for every generated token of every trajectory, in the order given."""

    def begin(self, outcomes: Sequence[Outcome]) -> Credit:
        """The part of `assign` that needs no forward pass; none unless the algorithm `ends_in_loss`."""
        return uniform(outcomes, np.zeros(len(outcomes)))


def uniform(outcomes: Sequence[Outcome], advantages: Sequence[float]) -> Credit:
    """One advantage per trajectory, the same for each of its tokens."""
    return Credit([np.full(o.tokens, a, np.float32) for o, a in zip(outcomes, advantages, strict=True)])


def rewards_of(outcomes: Sequence[Outcome]) -> np.ndarray:
    """float64 [N]"""
    return np.array([o.reward for o in outcomes], np.float64)


def groups_of(outcomes: Sequence[Outcome]) -> list[str]:
    return [o.group_id for o in outcomes]

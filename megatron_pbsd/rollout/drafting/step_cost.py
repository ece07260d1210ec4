"""What an engine's steps cost, learned from their seconds as they come."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

LEAST_STEPS = 8
"""Steps of a kind, plain or with drafts, that make known what such steps cost."""
OUTLIER = 3.0
"""A step that takes so many times as long as expected says something about the machine, and counts as this much."""
PACE_STEPS = 8.0
"""Steps over which the machine's pace is measured."""

PACE_LIMIT = 2.0
"""Where steps take more than so many times as long as expected, or less than one so many-th, it is not the pace."""


class DecayedLeastSquares:
    """Linear in n features, the newest `memory` observations or so counting most."""

    def __init__(self, features: int, memory: float):
        self._moments, self._products = np.zeros((features, features)), np.zeros(features)
        self._kept = 1 - 1 / memory
        self._count = self._squares = 0.0
        self._ridge = 1e-12 * np.eye(features)
        self._weights: list[float] | None = None
        self.observations = 0

    def observe(self, features: Sequence[float], value: float) -> None:
        x = np.array(features, float)
        self._moments *= self._kept
        self._moments += x[:, None] * x
        self._products *= self._kept
        self._products += value * x
        self._count = self._kept * self._count + 1
        self._squares = self._kept * self._squares + value * value
        self._weights = None
        self.observations += 1

    @property
    def weights(self) -> list[float]:
        """Solved for when they are asked for, which is rarer than observations are."""
        if self._weights is None:
            # Features that never changed apart from each other share what they explain.
            ridge = self._ridge + np.diag(1e-4 * self._moments.diagonal())
            self._weights = np.linalg.solve(self._moments + ridge, self._products).tolist()
        return self._weights

    def predict(self, features: Sequence[float]) -> float:
        return sum(weight * x for weight, x in zip(self.weights, features))

    @property
    def error(self) -> float:
        """Standard error of what is predicted, in the middle of what was observed."""
        free = self._count - len(self._products)
        if free <= 0:
            return 0.0
        weights = np.array(self.weights)
        residual = self._squares - 2 * weights @ self._products + weights @ self._moments @ weights
        return float(np.sqrt(max(0.0, residual) / (free * self._count)))


class StepCost:
    """`T(B, γ)` of Seer's rule (arXiv 2511.14617), measured while the engine runs: a plain step of B sequences, of
    which those that read more than one token read so many (`reads`), takes a + b·B + r·|reads| + p·Σ reads seconds;
    drafting for `attempts` of them, and verifying the `drafted` tokens that come of it, takes
    c + s·attempts + d·drafted more.

    All that at a pace of 1. The pace is by how much the latest steps took longer than expected, of either kind: who
    shares a machine with others finds it slower for a second and faster for the next, and would take one kind of step
    for cheaper than the other because of when it was looked at.
    """

    def __init__(self) -> None:
        self._plain = DecayedLeastSquares(4, 64.0)
        self._extra = DecayedLeastSquares(3, 32.0)
        self._pace = 1.0

    @property
    def knows_plain(self) -> bool:
        return self._plain.observations >= LEAST_STEPS

    @property
    def draft_steps(self) -> int:
        return self._extra.observations

    def plain(self, sequences: int, reads: Sequence[int]) -> float:
        """Seconds, never negative."""
        return max(0.0, self._plain.predict((1.0, sequences, len(reads), sum(reads))))

    def least(self, sequences: int, reads: Sequence[int]) -> float:
        """Seconds that a plain step takes at least, in all likelihood (two standard errors)."""
        return max(0.0, self.plain(sequences, reads) - 2 * self._plain.error)

    def extra(self, attempts: float, drafted: np.ndarray | float) -> np.ndarray:
        """Seconds of each number of drafted tokens, never negative."""
        fixed, per_attempt, per_token = self._extra.weights
        return np.maximum(fixed + per_attempt * attempts + per_token * np.asarray(drafted), 0.0)

    def observe(self, sequences: int, reads: Sequence[int], attempts: int, drafted: int, seconds: float) -> float:
        """Of a step. Returns its seconds at a pace of 1, as many of them as say something about such steps. Before
        plain steps are known, those with drafts teach nothing."""
        plain = self.plain(sequences, reads) if self.knows_plain else 0.0
        seconds /= self._pace
        known = self._extra.observations >= LEAST_STEPS if attempts else self.knows_plain
        expected = plain + (float(self.extra(attempts, drafted)) if attempts else 0.0)
        if known and expected > 0.0:
            seconds = min(seconds, OUTLIER * expected)
            pace = self._pace * (1 + (seconds / expected - 1) / PACE_STEPS)
            self._pace = min(max(pace, 1 / PACE_LIMIT), PACE_LIMIT)
        if not attempts:
            self._plain.observe((1.0, sequences, len(reads), sum(reads)), seconds)
        elif self.knows_plain:
            self._extra.observe((1.0, attempts, drafted), seconds - plain)
        return seconds

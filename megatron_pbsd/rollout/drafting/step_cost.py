"""What an engine's steps cost, learned from their seconds as they come."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

LEAST_STEPS = 8
"""Steps of a kind, plain or with drafts, that make known what such steps cost."""
OUTLIER = 3.0
"""A step that takes so many times as long as expected says something about the machine, and counts as this much."""


class DecayedLeastSquares:
    """Linear in n features, the newest `memory` observations or so counting most."""

    def __init__(self, features: int, memory: float):
        self._moments, self._products = np.zeros((features, features)), np.zeros(features)
        self._kept = 1 - 1 / memory
        self._weights = np.zeros(features)
        self._count = self._squares = 0.0
        self.observations = 0

    def observe(self, features: Sequence[float], value: float) -> None:
        x = np.array(features, float)
        if self.observations >= len(x):
            self._count = self._kept * self._count + 1
            self._squares = self._kept * self._squares + (value - self._weights @ x) ** 2
        self._moments = self._kept * self._moments + np.outer(x, x)
        self._products = self._kept * self._products + value * x
        # Features that never changed apart from each other share what they explain.
        ridge = np.diag(1e-4 * self._moments.diagonal() + 1e-12)
        self._weights = np.linalg.solve(self._moments + ridge, self._products)
        self.observations += 1

    def predict(self, features: Sequence[float]) -> float:
        return float(self._weights @ np.array(features, float))

    @property
    def error(self) -> float:
        """Standard error of what is predicted, in the middle of what was observed."""
        return float(np.sqrt(self._squares) / self._count) if self._count else 0.0


class StepCost:
    """`T(B, γ)` of Seer's rule (arXiv 2511.14617), measured while the engine runs: a plain step of B sequences, of
    which those that read more than one token read so many (`reads`), takes a + b·B + r·|reads| + p·Σ reads seconds;
    drafting for `attempts` of them, and verifying the `drafted` tokens that come of it, takes s·attempts + d·drafted
    more."""

    def __init__(self) -> None:
        self._plain = DecayedLeastSquares(4, 64.0)
        self._extra = DecayedLeastSquares(2, 32.0)

    @property
    def knows_plain(self) -> bool:
        return self._plain.observations >= LEAST_STEPS

    @property
    def plain_steps(self) -> int:
        return self._plain.observations

    @property
    def draft_steps(self) -> int:
        return self._extra.observations

    def plain(self, sequences: int, reads: Sequence[int]) -> float:
        """Seconds, never negative."""
        return max(0.0, self._plain.predict((1.0, sequences, len(reads), sum(reads))))

    def least(self, sequences: int, reads: Sequence[int]) -> float:
        """Seconds that a plain step takes at least, in all likelihood (two standard errors)."""
        return max(0.0, self.plain(sequences, reads) - 2 * self._plain.error)

    def extra(self, attempts: float, drafted: float) -> float:
        """Seconds, never negative."""
        return max(0.0, self._extra.predict((attempts, drafted)))

    def counted(self, sequences: int, reads: Sequence[int], attempts: int, drafted: int, seconds: float) -> float:
        """As many of a step's seconds as say something about such steps."""
        known = self._extra.observations >= LEAST_STEPS if attempts else self.knows_plain
        if not known:
            return seconds
        expected = self.plain(sequences, reads) + (self.extra(attempts, drafted) if attempts else 0.0)
        return min(seconds, OUTLIER * expected)

    def observe(self, sequences: int, reads: Sequence[int], attempts: int, drafted: int, seconds: float) -> None:
        """Of a step, the seconds that count. Before plain steps are known, those with drafts teach nothing."""
        if not attempts:
            self._plain.observe((1.0, sequences, len(reads), sum(reads)), seconds)
        elif self.knows_plain:
            self._extra.observe((attempts, drafted), seconds - self.plain(sequences, reads))

"""Turn-level evidence for the verified answer (docs/pbsd.md, 'Evidence').

    e_k = sum over tokens t of turn k of  delta_t = log pi_teacher(y_t) - log pi_student(y_t)

Summed over a whole trajectory this is `log p(a*|x, trajectory) - log p(a*|x)`: by how much the trajectory makes the
verified answer likelier. Partial sums are the same ratio for the prefix.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_pbsd.algorithms.protocol import Outcome


@dataclass(frozen=True)
class Evidence:
    """Sums over the tokens of each of K turns: of one trajectory, or of several along the leading dimensions `…`.

    turns:      float64 […, K], e_k (nats).
    tokens:     […, K], scored tokens n_k.
    generated:  […, K], tokens of the turn, scored or not.
    squares:    float64 […], sum of delta² over the trajectory's scored tokens.
    """

    turns: np.ndarray
    tokens: np.ndarray
    generated: np.ndarray
    squares: np.ndarray

    @property
    def spread(self) -> np.ndarray:
        """Standard deviation of the trajectory's token terms, […]; 0 without scored tokens."""
        n = np.maximum(self.tokens.sum(-1), 1)
        return np.sqrt(np.maximum(self.squares / n - (self.turns.sum(-1) / n) ** 2, 0))


def turn_evidence(outcome: Outcome, exclude_answer_span: bool) -> Evidence:
    """Evidence of each turn of one trajectory. A turn without scored tokens has evidence 0 and n_k = 0."""
    scored = ~outcome.answer_mask if exclude_answer_span else np.ones(len(outcome.turn_index), bool)
    delta = (outcome.given("teacher") - outcome.given("student"))[scored]
    turn = outcome.turn_index[scored]
    return Evidence(
        turns=np.bincount(turn, weights=delta, minlength=outcome.turns),
        tokens=np.bincount(turn, minlength=outcome.turns),
        generated=np.bincount(outcome.turn_index, minlength=outcome.turns),
        squares=np.square(delta).sum(),
    )

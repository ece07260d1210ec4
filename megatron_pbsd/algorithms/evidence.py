"""Turn-level evidence for the verified answer (docs/pbsd.md, 'Evidence').

    e_k = sum over tokens t of turn k of  log pi_teacher(y_t) - log pi_student(y_t)

Summed over a whole trajectory this is `log p(a*|x, trajectory) - log p(a*|x)`: by how much the trajectory makes the
verified answer likelier. Partial sums are the same ratio for the prefix.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_pbsd.algorithms.protocol import Outcome


@dataclass(frozen=True)
class Evidence:
    """turns: float64 [K], e_k (nats). tokens: int64 [K], scored tokens n_k. spread: std of the token terms."""

    turns: np.ndarray
    tokens: np.ndarray
    spread: float


def turn_evidence(outcome: Outcome, exclude_answer_span: bool) -> Evidence:
    """Evidence of each turn. A turn without scored tokens has evidence 0 and n_k = 0."""
    if outcome.student is None or outcome.teacher is None:
        raise ValueError("turn evidence needs the log-probs of student and teacher; the algorithm must list them in "
                         "`needs`")
    scored = ~outcome.answer_mask if exclude_answer_span else np.ones(len(outcome.turn_index), bool)
    delta = (outcome.teacher.astype(np.float64) - outcome.student)[scored]
    turn = outcome.turn_index[scored]
    return Evidence(
        turns=np.bincount(turn, weights=delta, minlength=outcome.turns),
        tokens=np.bincount(turn, minlength=outcome.turns),
        spread=float(delta.std()) if len(delta) else 0.0,
    )

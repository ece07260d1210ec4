"""Shaping: what is added to or taken from the outcome reward before a baseline is subtracted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_pbsd.algorithms.protocol import Need, Outcome
from megatron_pbsd.kl import k1


def overlong_penalty(tokens: int, longest: int, cache: int) -> float:
    """Soft punishment of length (DAPO, arXiv 2503.14476, eq. 13), -1 … 0.

    0 up to `longest - cache` generated tokens, then falling linearly to -1 at `longest`.
    """
    return -float(np.clip((tokens - (longest - cache)) / cache, 0.0, 1.0))


def kl_needs(kl_penalty: float) -> frozenset[Need]:
    """What `token_rewards` reads of an outcome."""
    return frozenset({"student", "reference"} if kl_penalty else ())


def token_rewards(outcome: Outcome, reward: float, kl_penalty: float) -> np.ndarray:
    """Rewards of generated tokens, float64 [n]: `-kl_penalty (log pi_old - log pi_reference)` at each, and the outcome
    reward at the last (arXiv 2203.02155, section 3.5; REINFORCE++, arXiv 2501.03262, eq. 8 and 9)."""
    rewards = -kl_penalty * k1(log_ratio(outcome)) if kl_penalty else np.zeros(outcome.tokens)
    rewards[-1:] += reward
    return rewards


def kl_metrics(outcomes: Sequence[Outcome], kl_penalty: float) -> dict[str, float]:
    """credit/kl_reference: mean over tokens of log pi_old - log pi_reference (nats), where it is penalised."""
    if not kl_penalty:
        return {}
    return {"credit/kl_reference": float(k1(np.concatenate([log_ratio(o) for o in outcomes])).mean())}


def log_ratio(outcome: Outcome) -> np.ndarray:
    """log pi_old - log pi_reference of generated tokens (nats), float64 [n]."""
    return outcome.given("student") - outcome.given("reference")

"""Estimates of KL(p || q) from single samples of p (J. Schulman, 'Approximating KL divergence', 2020).

Each takes `log_ratio = log p(sample) - log q(sample)`, a numpy array or a torch tensor of any shape, and returns the
same kind and shape. As *values* k1 and k3 have the right expectation, and k2 nearly when p and q are close.

As *losses* they do something else, because differentiating the estimate forgets that the samples depend on p. With
p the policy, on average over its samples (Tang & Munos, arXiv 2506.09477):

    grad k1  =  0                        noise; k1 is for penalties that go into the reward
    grad k2  =  grad KL(p || q)
    grad k3  =  grad KL(q || p)

Either way a token's KL sees only its own distribution, not where the token leads.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np

Array = TypeVar("Array")


def k1(log_ratio: Array) -> Array:
    """log p - log q: unbiased, of either sign."""
    return log_ratio


def k2(log_ratio: Array) -> Array:
    """(log p - log q)^2 / 2: biased, never negative."""
    return 0.5 * log_ratio**2


def k3(log_ratio: Array) -> Array:
    """q / p - 1 - log(q / p): unbiased, never negative."""
    excess = (-log_ratio).expm1() if hasattr(log_ratio, "expm1") else np.expm1(-log_ratio)
    return excess + log_ratio


ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}

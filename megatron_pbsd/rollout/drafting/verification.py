"""Which tokens of a draft are kept, so that what is generated is what the model alone would have generated."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def agreeing(draft: Sequence[int], sampled: Sequence[int]) -> int:
    """How many tokens of a draft were sampled too, each after those before it.

    sampled: one token for each of the draft's, and one more, each from the model's logits after the draft's tokens
    before it and by the random number of its position. The first `agreeing + 1` of them are the very tokens that
    sampling one by one gives; the rest was sampled after tokens that were never generated.
    """
    if not draft:
        return 0
    return next((i for i, (token, wanted) in enumerate(zip(draft, sampled)) if token != wanted), len(draft))


def accepted_or_resampled(
    draft: Sequence[int], drafted_from: np.ndarray, target: np.ndarray, uniforms: np.ndarray
) -> list[int]:
    """Speculative sampling (Leviathan et al., ICML 2023, algorithm 1; Chen et al., arXiv 2302.01318): for sampling
    without a random number per position.

    drafted_from [γ, V]: the distribution that each token of the draft was drawn from. target [γ + 1, V]: the model's.
    uniforms [γ + 1, 2] in [0, 1): for each position whether to accept, and what to take instead.
    A token is accepted with chance min(1, p / q); after the first that is not, one comes from max(0, p − q),
    normalised; after the last of all one comes from `target`. Each token is distributed as `target` has it.
    """
    kept: list[int] = []
    for token, q, p, (accept, resample) in zip(draft, drafted_from, target, uniforms):
        if accept * q[token] >= p[token]:
            return [*kept, _drawn(np.maximum(p - q, 0.0), resample)]
        kept.append(token)
    return [*kept, _drawn(target[len(draft)], uniforms[len(draft), 1])]


def _drawn(weights: np.ndarray, uniform: float) -> int:
    cumulative = np.cumsum(weights)
    return int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))

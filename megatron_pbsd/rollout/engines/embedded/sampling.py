"""Counter-based sampling: a token depends on its logits, the seed, the request and its position, on nothing else."""

from __future__ import annotations

import hashlib

import numpy as np
import torch

GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def splitmix64(state: np.ndarray) -> np.ndarray:
    """The n-th output of SplitMix64 from its n-th state, both uint64 (Steele, Lea & Flood, OOPSLA 2014)."""
    z = state
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def request_key(seed: int, request_id: str) -> int:
    """Key of the random stream of a request: 64 bits of BLAKE2b of the id, keyed by the seed."""
    digest = hashlib.blake2b(request_id.encode(), digest_size=8, key=seed.to_bytes(16, "little", signed=True)).digest()
    return int.from_bytes(digest, "little")


def uniforms(keys: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """One float64 in [0, 1) per (key, absolute position), both uint64 [B]."""
    bits = splitmix64(keys + (positions + np.uint64(1)) * GOLDEN_GAMMA)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def sample(logits: torch.Tensor, temperatures: np.ndarray, uniform: np.ndarray) -> tuple[list[int], list[float]]:
    """Draw one token per row by inverting the CDF of softmax(logits / temperature) at `uniform`.

    logits [B, V]; temperatures, uniform float64 [B]; temperature 0 takes the argmax.
    Returns the tokens and their log-probs at temperature 1. FloatingPointError names the rows whose logits are NaN.
    """
    logits = logits.float()
    log_probs = torch.log_softmax(logits, dim=-1)
    if (broken := log_probs[:, 0].isnan()).any():
        raise FloatingPointError(broken.nonzero().flatten().tolist())
    greedy = temperatures == 0.0
    if greedy.all():
        tokens = logits.argmax(dim=-1)
    else:
        scale = torch.from_numpy(np.where(greedy, 1.0, temperatures)).to(logits)
        # In float64, so that no tail token's mass is lost to rounding however large the vocabulary.
        cumulative = torch.softmax(logits / scale[:, None], dim=-1).cumsum(dim=-1, dtype=torch.float64)
        threshold = torch.from_numpy(uniform).to(cumulative) * cumulative[:, -1]
        tokens = torch.searchsorted(cumulative, threshold[:, None], right=True).squeeze(1)
        if greedy.any():
            tokens = torch.where(torch.from_numpy(greedy).to(tokens.device), logits.argmax(dim=-1), tokens)
    chosen = log_probs.gather(1, tokens[:, None]).squeeze(1)
    return tokens.tolist(), chosen.tolist()

"""The same chunk gives the same tokens whatever runs beside it, and however it is cut."""

from __future__ import annotations

import random
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from megatron_pbsd.rollout.engines.protocol import Chunk

NEW_TOKENS = 24


def roll_out(engine, prompts, *, chunk_tokens=NEW_TOKENS, order=0, forget=False):
    """Tokens and log-probs per prompt, in chunks of `chunk_tokens`; `forget` drops the KV after each."""
    tokens, log_probs = defaultdict(tuple), defaultdict(tuple)

    def chunk(i: int) -> Chunk:
        return Chunk(f"r{i}", prompts[i] + tokens[i], min(chunk_tokens, NEW_TOKENS - len(tokens[i])), seed=12)

    arrivals = list(range(len(prompts)))
    random.Random(order).shuffle(arrivals)
    engine.submit([chunk(i) for i in arrivals])
    while ended := engine.collect():
        for result in ended:
            i = int(result.request_id[1:])
            tokens[i] += result.tokens
            log_probs[i] += result.log_probs
            if forget:
                engine.release([result.request_id])
            if len(tokens[i]) < NEW_TOKENS:
                engine.submit([chunk(i)])
    indices = range(len(prompts))
    return [tokens[i] for i in indices], np.array([log_probs[i] for i in indices])


VARIANTS = [
    dict(slots=16, order=5),
    dict(slots=1),
    dict(slots=16, chunk_tokens=3),
    dict(slots=3, chunk_tokens=5),
    dict(slots=16, chunk_tokens=7, forget=True),
    dict(slots=40, chunk_tokens=1),
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_batch_chunk_order_and_eviction_change_nothing(make_engine, family, prompts, variant):
    tokens, log_probs = roll_out(make_engine(family, slots=16), prompts)
    other_tokens, other_log_probs = roll_out(make_engine(family, slots=variant["slots"]), prompts, **_rest(variant))
    assert other_tokens == tokens
    np.testing.assert_allclose(other_log_probs, log_probs, atol=1e-5)


def _rest(variant: dict) -> dict:
    return {key: value for key, value in variant.items() if key != "slots"}


def is_known_cpu() -> bool:
    """The bounds in attention.py were found for MKL's kernels on Intel's AVX-512. MKL takes others on AMD's."""
    cpuinfo = Path("/proc/cpuinfo")
    return (torch.backends.mkl.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"
            and cpuinfo.exists() and "GenuineIntel" in cpuinfo.read_text())


@pytest.mark.skipif(not is_known_cpu(), reason="bit equality is established for MKL on Intel's AVX-512")
@pytest.mark.parametrize("dense_family", ["qwen3", "llama"])
def test_log_probs_keep_their_bits(make_engine, dense_family, prompts):
    long = [prompt * 9 for prompt in prompts]
    whole = make_engine(dense_family, slots=16, max_context=1024)
    tokens, log_probs = roll_out(whole, long)
    for variant in VARIANTS:
        engine = make_engine(dense_family, slots=variant["slots"], max_context=1024)
        np.testing.assert_array_equal(roll_out(engine, long, **_rest(variant))[1], log_probs)
    scores = whole.score([prompt + new for prompt, new in zip(long, tokens)])
    np.testing.assert_array_equal([score[-NEW_TOKENS:] for score in scores], log_probs)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.integers(1, 9), min_size=3, max_size=12), neighbours=st.integers(0, 6), seed=st.integers(0, 9))
def test_arbitrary_cuts(make_engine, cuts, neighbours, seed):
    total = sum(cuts)
    alone = make_engine(slots=1)
    alone.submit([Chunk("r", (1, 2, 3), total, seed=seed, temperature=1.3)])
    (expected,) = alone.collect()
    engine = make_engine(slots=3)
    tokens: tuple[int, ...] = ()
    for n, cut in enumerate(cuts):
        crowd = [Chunk(f"{n}-{i}", tuple(range(i + 1)), 1 + i, seed=seed) for i in range(neighbours)]
        engine.submit([*crowd, Chunk("r", (1, 2, 3) + tokens, cut, seed=seed, temperature=1.3)])
        while ended := engine.collect():
            tokens += next((r.tokens for r in ended if r.request_id == "r"), ())
    assert tokens == expected.tokens

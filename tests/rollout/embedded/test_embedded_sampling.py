from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_pbsd.rollout.engines.embedded.sampling import request_key, sample, uniforms
from megatron_pbsd.rollout.engines.protocol import Chunk

# 99.9 % quantiles of the chi-square distribution.
CHI_SQUARE_7, CHI_SQUARE_15, CHI_SQUARE_99 = 24.32, 37.70, 148.23


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> float:
    expected = counts.sum() * probabilities
    return float(((counts - expected) ** 2 / expected).sum())


def test_bits_are_splitmix64():
    outputs = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    drawn = uniforms(np.full(3, 1234567, np.uint64), np.arange(3, dtype=np.uint64))
    assert drawn.tolist() == [(bits >> 11) / 2**53 for bits in outputs]


def test_uniforms_are_uniform_over_requests_and_positions():
    keys = np.array([request_key(5, f"12/{i}/0") for i in range(300)], dtype=np.uint64)
    drawn = uniforms(keys[:, None], np.arange(300, dtype=np.uint64)[None])
    assert drawn.min() >= 0 and drawn.max() < 1
    counts = np.histogram(drawn, bins=100, range=(0, 1))[0]
    assert chi_square(counts, np.full(100, 0.01)) < CHI_SQUARE_99
    for a, b in ((drawn[1:], drawn[:-1]), (drawn[:, 1:], drawn[:, :-1])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.015


def test_key_depends_on_seed_and_request():
    keys = {request_key(seed, name) for seed in (-1, 0, 1, 2**62) for name in ("a", "b", "ab", "")}
    assert len(keys) == 16


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_sampled_frequencies_follow_the_distribution(temperature):
    logits = torch.randn(8, generator=torch.Generator().manual_seed(0))
    uniform = uniforms(np.arange(20_000, dtype=np.uint64), np.zeros(20_000, dtype=np.uint64))
    tokens, log_probs = sample(logits.expand(20_000, 8), np.full(20_000, temperature), uniform)
    probabilities = torch.softmax(logits.double() / temperature, 0).numpy()
    assert chi_square(np.bincount(tokens, minlength=8), probabilities) < CHI_SQUARE_7
    np.testing.assert_allclose(log_probs, torch.log_softmax(logits, 0)[tokens], atol=1e-6)


def test_extremes_of_the_uniform_stay_inside_the_support():
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]]).expand(2, 4)
    tokens, _ = sample(logits, np.ones(2), np.array([0.0, 1 - 2.0**-53]))
    assert tokens == [1, 2]


def test_greedy_and_sampled_rows_mix():
    logits = torch.tensor([[0.0, 3.0, 0.0]]).expand(3, 3)
    tokens, _ = sample(logits, np.array([0.0, 1e-3, 1e6]), np.array([0.99, 0.99, 0.99]))
    assert tokens == [1, 1, 2]


def test_nan_logits_name_their_rows():
    logits = torch.zeros(3, 4)
    logits[1, 2] = torch.nan
    with pytest.raises(FloatingPointError) as error:
        sample(logits, np.ones(3), np.full(3, 0.5))
    assert error.value.args[0] == [1]


def test_engine_samples_the_models_distribution(make_engine, reference):
    """First tokens of 3000 requests with one prompt, their 96 tokens pooled into 16 classes."""
    engine = make_engine(slots=64)
    engine.submit([Chunk(f"{i}", (4, 5, 6), 1, seed=17) for i in range(3000)])
    counts = np.zeros(96)
    while ended := engine.collect():
        for result in ended:
            counts[result.tokens[0]] += 1
        engine.release([result.request_id for result in ended])
    with torch.no_grad():
        probabilities = torch.softmax(reference()(torch.tensor([[4, 5, 6]])).logits[0, -1].double(), 0).numpy()
    classes = np.argsort(probabilities).reshape(6, 16)
    assert chi_square(counts[classes].sum(0), probabilities[classes].sum(0)) < CHI_SQUARE_15

"""KL estimators: on average over samples they have the value, and as losses the gradient, that is claimed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_pbsd.kl import ESTIMATORS, k1, k3


def distributions(spread: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    logits, other = (spread * torch.randn(6, generator=random, dtype=torch.float64) for _ in range(2))
    return logits.requires_grad_(), other.log_softmax(-1)


def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return (p.exp() * (p - q)).sum()


def test_values():
    for estimate in (k1, k3):
        logits, q = distributions()
        p = logits.log_softmax(-1)
        torch.testing.assert_close((p.exp() * estimate(p - q)).sum(), kl(p, q))
    logits, q = distributions(0.02)
    p = logits.log_softmax(-1)
    torch.testing.assert_close((p.exp() * ESTIMATORS["k2"](p - q)).sum(), kl(p, q), rtol=0.02, atol=0)


@pytest.mark.parametrize(("name", "meant"), [
    ("k1", lambda p, q: 0 * kl(p, q)), ("k2", kl), ("k3", lambda p, q: kl(q, p))])
def test_gradients_as_losses(name, meant):
    """The expectation over samples of the gradient of the estimate: samples are not differentiated."""
    logits, q = distributions()
    p = logits.log_softmax(-1)
    found = torch.autograd.grad((p.exp().detach() * ESTIMATORS[name](p - q)).sum(), logits)[0]
    logits, q = distributions()
    wanted = torch.autograd.grad(meant(logits.log_softmax(-1), q), logits)[0]
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_numpy_and_torch_agree(name):
    log_ratio = np.linspace(-3, 3, 13).reshape(1, 13)
    found = ESTIMATORS[name](log_ratio)
    assert isinstance(found, np.ndarray)
    np.testing.assert_allclose(found, ESTIMATORS[name](torch.from_numpy(log_ratio)).numpy())
    assert name == "k1" or (found >= 0).all()


def test_k3_is_accurate_near_zero():
    assert float(k3(torch.tensor(1e-4))) == pytest.approx(5e-9, rel=0.02)

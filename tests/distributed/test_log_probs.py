"""Vocab-parallel log-probs and entropy against log_softmax over the whole vocabulary."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_pbsd.losses.log_probs import log_probs_and_entropy

VOCABULARY = 24


def problem(scale: float):
    generator = torch.Generator().manual_seed(1)
    tokens = 600
    logits = scale * torch.randn(tokens, VOCABULARY, generator=generator)
    return (logits, torch.randint(0, VOCABULARY, (tokens,), generator=generator),
            torch.randn(tokens, generator=generator), torch.randn(tokens, generator=generator))


def local(rank, rendezvous, world_size, scale, with_entropy):
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size)
    try:
        logits, targets, a, b = problem(scale)
        share = logits.chunk(world_size, -1)[rank].clone().requires_grad_()
        # A copy, as the function overwrites what it is given.
        log_probs, entropy = log_probs_and_entropy(share * 1, targets, dist.group.WORLD)
        ((log_probs * a).sum() + ((entropy * b).sum() if with_entropy else 0)).backward()
        return log_probs.detach().numpy(), entropy.detach().numpy(), share.grad.numpy()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("scale", [1.0, 200.0])
def test_values_and_gradients(ranks, world_size, scale, with_entropy):
    results = ranks.run(local, world_size, world_size, scale, with_entropy)
    logits, targets, a, b = problem(scale)
    logits = logits.double().requires_grad_()
    p = logits.log_softmax(-1)
    log_probs = p.gather(-1, targets[:, None])[:, 0]
    entropy = -(p.exp() * p).sum(-1)
    ((log_probs * a).sum() + ((entropy * b).sum() if with_entropy else 0)).backward()
    for found in results:
        np.testing.assert_allclose(found[0], log_probs.detach(), rtol=1e-6, atol=2e-6)
        np.testing.assert_allclose(found[1], entropy.detach(), rtol=1e-5, atol=5e-6)
    np.testing.assert_allclose(np.concatenate([f[2] for f in results], -1), logits.grad, rtol=1e-4, atol=5e-6)


def test_empty():
    class One:
        def size(self): return 1
        def rank(self): return 0

    logits = torch.zeros(0, 8, requires_grad=True)
    log_probs, entropy = log_probs_and_entropy(logits * 1, torch.zeros(0, dtype=torch.int64), One())
    (log_probs.sum() + entropy.sum()).backward()
    assert logits.grad.shape == (0, 8)

"""Rotary positions of packed sequences: those of Megatron-core's rotation of each sequence alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

from megatron_pbsd.learner.microbatch import Shape, places
from megatron_pbsd.platform.cpu_modules import packed_positions, rotate_packed


class Ranks:
    """What is read of a process group."""

    def __init__(self, size: int, rank: int):
        self.size, self.rank = lambda: size, lambda: rank


@pytest.mark.parametrize("cp", [1, 2, 4])
def test_positions_are_where_the_learner_has_put_the_tokens(cp):
    for rank in range(cp):
        _, position, bounds = places([13, 1, 40, 7], Shape(packed=True, cp=cp), rank)
        found = packed_positions(torch.from_numpy(bounds), Ranks(cp, rank))
        np.testing.assert_array_equal(found.numpy(), position[0])


@pytest.mark.parametrize(("dtype", "precision"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-6)])
@pytest.mark.parametrize("rotated", [16, 12])
@pytest.mark.parametrize("options", [{}, {"multi_latent_attention": True, "mscale": 0.8}], ids=["grouped", "latent"])
def test_each_sequence_is_rotated_as_if_it_were_alone(rotated, dtype, precision, options):
    torch.manual_seed(0)
    lengths, heads, width = [13, 1, 40, 7], 3, 16
    angles = torch.outer(torch.arange(40.0), 100 ** -torch.linspace(0, 1, rotated // 2)).repeat(1, 2)[:, None, None]
    tensor = torch.randn(sum(lengths), heads, width, dtype=dtype, requires_grad=True)
    alone = torch.cat([
        _apply_rotary_pos_emb_bshd(part[:, None], angles[: len(part)], **options)[:, 0]
        for part in tensor.split(lengths)])
    bounds = torch.tensor([0, *np.cumsum(lengths)]).int()
    together = rotate_packed(tensor, bounds, angles, cp_group=Ranks(1, 0), **options)
    direction = torch.randn_like(tensor)
    gradients = [torch.autograd.grad(result, tensor, direction)[0] for result in (together, alone)]
    for found, expected in ((together, alone), gradients):
        torch.testing.assert_close(found, expected, rtol=precision, atol=precision)

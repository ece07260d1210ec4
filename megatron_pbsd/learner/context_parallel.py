"""Sums over context-parallel ranks, each of which holds a part of every sequence."""

from __future__ import annotations

import torch
import torch.distributed as dist


class _Sum(torch.autograd.Function):
    """The loss is the sum of what the ranks compute, and all of them read the sum: so its gradient is summed too."""

    @staticmethod
    def forward(ctx, tensor, group):
        ctx.group = group
        summed = tensor.clone()
        dist.all_reduce(summed, group=group)
        return summed

    @staticmethod
    def backward(ctx, grad):
        summed = grad.clone()
        dist.all_reduce(summed, group=ctx.group)
        return summed, None


def sum_over(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Sum over the ranks of `group`, in the forward and in the backward pass."""
    return _Sum.apply(tensor, group) if group.size() > 1 else tensor

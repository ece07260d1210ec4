"""What context-parallel ranks, each of which holds a part of every sequence, do together; the group may be the
micro-batch's own."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import attention


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


class SelfAttention(attention.SelfAttention):
    """Megatron-core's with rotary positions for the group that `packed_seq_params` names, if it names one.

    Core hands that group to Transformer Engine's attention but rotates queries and keys as parts of sequences divided
    over the static group (0.16.1).
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        core = type(self.core_attention)
        # Core makes the stream of Transformer Engine's context parallelism only for static groups.
        if getattr(core, "cp_stream", core) is None:
            core.cp_stream = torch.cuda.Stream()

    def forward(self, *args: Any, packed_seq_params: PackedSeqParams | None = None, **kwargs: Any):
        static = self.pg_collection
        if packed_seq_params is not None and packed_seq_params.cp_group is not None:
            # All layers have the same collection.
            self.pg_collection = copy.copy(static)
            self.pg_collection.cp = packed_seq_params.cp_group
        try:
            return super().forward(*args, packed_seq_params=packed_seq_params, **kwargs)
        finally:
            self.pg_collection = static

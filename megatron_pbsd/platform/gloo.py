"""What gloo lacks: collectives over parts of unequal sizes, as experts with tensor parallelism of their own need."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

Collective = Callable[..., torch.Tensor]


def gather_uneven(even: Collective) -> Collective:
    """Megatron-core's all-gather along the first dimension; `even` is the original, for equal parts."""

    def gather(tensor: torch.Tensor, group: dist.ProcessGroup, sizes: Sequence[int] | None = None,
               use_global_buffer: bool = False) -> torch.Tensor:
        if sizes is None or group.size() == 1:
            return even(tensor, group, use_global_buffer=use_global_buffer)
        longest = tensor.new_zeros(max(sizes), *tensor.shape[1:])
        longest[: len(tensor)] = tensor
        parts = [torch.empty_like(longest) for _ in sizes]
        dist.all_gather(parts, longest, group=group)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    return gather


def reduce_scatter_uneven(even: Collective) -> Collective:
    """Megatron-core's reduce-scatter along the first dimension; `even` is the original, for equal parts."""

    def reduce_scatter(tensor: torch.Tensor, group: dist.ProcessGroup, sizes: Sequence[int] | None = None,
                       use_global_buffer: bool = False) -> torch.Tensor:
        if sizes is None or group.size() == 1:
            return even(tensor, group, use_global_buffer=use_global_buffer)
        summed = tensor.clone()
        dist.all_reduce(summed, group=group)
        return summed.split(list(sizes))[group.rank()]

    return reduce_scatter

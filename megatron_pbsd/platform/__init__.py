"""Hardware the learner runs on: device, collectives, random numbers, model modules."""

from __future__ import annotations

import torch

from megatron_pbsd.platform.protocol import Platform

__all__ = ["Platform", "select"]


def select() -> Platform:
    """CUDA where there is a GPU, else the CPU."""
    if torch.cuda.is_available():
        from megatron_pbsd.platform.cuda import Cuda

        return Cuda()
    from megatron_pbsd.platform.cpu import Cpu

    return Cpu()

"""What is planned for: GPUs, and the links between them, by published figures."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_pbsd.errors import UsageError, did_you_mean


@dataclass(frozen=True)
class Gpu:
    """memory: bytes that torch.cuda reports as the device's total. flops: dense bf16 per second. bandwidth: between the
    GPU and its memory; node: NVLink; network: the adapter that each GPU of a node has; bytes per second, links in one
    direction.

    gemm, attention: shares of `flops` that large matrix products and fused attention reach."""

    memory: float
    flops: float
    bandwidth: float
    node: float
    network: float
    gemm: float
    attention: float


AMPERE = {"flops": 312e12, "node": 300e9, "network": 25e9, "gemm": 0.80, "attention": 0.60}
HOPPER = {"flops": 989e12, "node": 450e9, "network": 50e9, "gemm": 0.70, "attention": 0.50}
GPUS = {
    "a100-40g": Gpu(memory=42.3e9, bandwidth=1.555e12, **AMPERE),
    "a100-80g": Gpu(memory=84.9e9, bandwidth=2.039e12, **AMPERE),
    "h100-80g": Gpu(memory=84.9e9, bandwidth=3.35e12, **HOPPER),
    "h800-80g": Gpu(memory=84.9e9, bandwidth=3.35e12, **HOPPER | {"node": 200e9}),
    "h200-141g": Gpu(memory=150.1e9, bandwidth=4.8e12, **HOPPER),
    "h20-96g": Gpu(memory=102.0e9, bandwidth=4.0e12, **HOPPER | {"flops": 148e12}),
    "b200-180g": Gpu(memory=191.5e9, flops=2.25e15, bandwidth=8.0e12, node=900e9, network=50e9, gemm=0.70,
                     attention=0.50),
    "cpu": Gpu(memory=4e9, flops=5e10, bandwidth=5e9, node=1e9, network=1e9, gemm=0.5, attention=0.25),
}
"""'cpu' is a core with 4 GB, of no machine in particular. Data sheets of NVIDIA for flops, bandwidth and NVLink; one
200 Gbit/s adapter for each A100 and one of 400 Gbit/s for each later GPU, as in DGX machines. FlashAttention-2 (arXiv
2307.08691, section 1) says that matrix products reach 80 to 90 % of an A100 and its kernel 50 to 73 %; FlashAttention-3
(arXiv 2407.08608) has its predecessor at 35 to 40 % of an H100 and itself at up to 75 %, in the backward pass less. The
share of matrix products on Hopper and later is an assumption."""

RESERVED, FRAGMENTED, LINKS = 2e9, 0.05, 0.8
"""Assumptions: bytes of a process's CUDA context, libraries and NCCL; share of the memory that allocators cannot hand
out; share of a link's speed that collectives of large messages reach."""


def gpu(name: str) -> Gpu:
    """UsageError, with the nearest name, when there is none."""
    if name not in GPUS:
        raise UsageError(f"GPU {name!r} is unknown; have {', '.join(GPUS)}" + did_you_mean(name, GPUS))
    return GPUS[name]


@dataclass(frozen=True)
class Cluster:
    """count: GPUs. per_node: of a node, which NVLink connects."""

    gpu: Gpu
    count: int
    per_node: int = 8

    @property
    def available(self) -> float:
        """Bytes of each GPU for tensors, and for what processes take besides."""
        return self.gpu.memory * (1 - FRAGMENTED)

    def ring(self, size: int, stride: int) -> float:
        """Bytes per second and GPU around a ring of `size` ranks, every `stride`-th one. Those of a node share what
        their adapters send."""
        near = self.near(size, stride)
        return LINKS * (self.gpu.node if near == size else min(self.gpu.node, near * self.gpu.network))

    def exchange(self, nbytes: float, size: int, stride: int) -> float:
        """Seconds in which each of `size` ranks, every `stride`-th one, sends equal parts of `nbytes` to all."""
        near, part = self.near(size, stride), nbytes / size
        return max((near - 1) * part / self.gpu.node, (size - near) * part / self.gpu.network) / LINKS

    def near(self, size: int, stride: int) -> int:
        """Ranks of such a group that are on one node."""
        return max(1, min(size, self.per_node // stride))

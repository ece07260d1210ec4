"""Facts of machines without any fault, to be broken by tests."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

from launcher.preflight.facts import (
    AllReduce,
    Canary,
    Clock,
    Disk,
    FabricPort,
    Gpu,
    Interface,
    Limits,
    NodeFacts,
    Observed,
    Pair,
)

GB = 10**9
VERSIONS = {"python": "3.11.9", "torch": "2.13.0", "CUDA": "12.9", "NCCL": "2.27.3", "ray": "2.60.0",
            "driver": "580.65", "driver CUDA": "13.0", "kernel": "6.1.0", "megatron-core": "0.16.1"}


def gpu(index: int, **changes) -> Gpu:
    return replace(Gpu(
        index, "NVIDIA H100 80GB HBM3", f"GPU-{index}", 85 * GB, 84 * GB, True, 0, 0, False, False, (), 345, 1980,
        700.0, 700.0, 16, 16, 18), **changes)


def node(rank: int, **changes) -> NodeFacts:
    return replace(NodeFacts(
        rank, f"node{rank}", f"node{rank}", f"10.0.0.{rank + 1}", f"10.0.0.{rank + 1}", VERSIONS, 6.0,
        tuple(gpu(index) for index in range(8)),
        (Interface("lo", "127.0.0.1", "255.0.0.0", True, 65536),
         Interface("eth0", f"10.0.0.{rank + 1}", "255.255.255.0", True, 9000, 100.0)),
        tuple(FabricPort(f"mlx5_{i}/1", "ACTIVE", "LinkUp", 400.0, "InfiniBand") for i in range(4)),
        (), 500 * GB, 499 * GB, Limits((1048576, 1048576), (None, None)),
        (Disk("run", "/lustre/run", "lustre", 9000 * GB, 2000.0), Disk("temporary", "/tmp", "ext4", 900 * GB, 1500.0)),
        {"NCCL_IB_HCA": "mlx5"}), **changes)


def cluster(size: int = 4, **changes) -> Observed:
    return replace(Observed(
        tuple(map(node, range(size))), size, "nccl",
        canaries=tuple(Canary(rank, 0.1, (rank + 1) % size) for rank in range(size)),
        clocks=tuple(Clock(rank, 0.01, 0.0002) for rank in range(1, size)),
        pairs=tuple(Pair(*both, 0, 45.0) for both in combinations(range(size), 2)),
        all_reduce=tuple(AllReduce(rank, 44.0) for rank in range(size))), **changes)


def with_node(observed: Observed, rank: int, **changes) -> Observed:
    return replace(observed, nodes=tuple(
        replace(one, **changes) if one.rank == rank else one for one in observed.nodes))


def with_gpu(observed: Observed, rank: int, index: int, **changes) -> Observed:
    gpus = next(one.gpus for one in observed.nodes if one.rank == rank)
    return with_node(observed, rank, gpus=tuple(
        replace(one, **changes) if one.index == index else one for one in gpus))

"""Process groups of the learner: one world, divided by Megatron-core into tensor, pipeline and data parallel groups."""

from __future__ import annotations

import math
from datetime import timedelta

import torch.distributed as dist
from megatron.core import parallel_state

from megatron_pbsd.config import ParallelConfig
from megatron_pbsd.learner.blocks import block_sizes
from megatron_pbsd.models.parameters import RankCoordinates, coordinates
from megatron_pbsd.platform import Platform

SLOWER_THAN_WATCHDOG_S = 60.0
"""Process groups give up this long after the watchdog has, whose error says who is at fault."""


def connect(
    platform: Platform, parallel: ParallelConfig, rank: int, store: dist.Store, deadline_s: float
) -> RankCoordinates:
    """Make the process groups of the ranks that share `store`.

    deadline_s: of the watchdog's phases, in which all collectives happen.
    """
    timeout = timedelta(seconds=deadline_s + SLOWER_THAN_WATCHDOG_S)
    dist.init_process_group(
        platform.backend, store=store, rank=rank, world_size=parallel.world_size, timeout=timeout)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp if parallel.vpp > 1 else None,
        context_parallel_size=parallel.cp,
        hybrid_context_parallel=parallel.dynamic_cp,
        expert_model_parallel_size=parallel.ep,
        expert_tensor_parallel_size=parallel.etp,
        create_gloo_process_groups=platform.backend != "gloo",
        distributed_timeout_minutes=math.ceil(timeout.total_seconds() / 60))
    if parallel.dynamic_cp:
        for size in block_sizes(parallel.dp)[1:]:
            # Core makes these groups with torch's own timeout.
            dist.distributed_c10d._set_pg_timeout(timeout, context_group(size))
    at = RankCoordinates(
        tp=parallel_state.get_tensor_model_parallel_rank(),
        cp=parallel_state.get_context_parallel_rank(),
        dp=parallel_state.get_data_parallel_rank(),
        pp=parallel_state.get_pipeline_model_parallel_rank(),
        ep=parallel_state.get_expert_model_parallel_rank(),
        etp=parallel_state.get_expert_tensor_parallel_rank(),
        expert_dp=parallel_state.get_expert_data_parallel_rank())
    if at != coordinates(parallel, rank):
        raise RuntimeError(f"Megatron-core placed rank {rank} at {at}; the parameter map expects "
                           f"{coordinates(parallel, rank)}")
    return at


def context_group(cp: int) -> dist.ProcessGroup:
    """The `cp` ranks that share this rank's micro-batch: its context-parallel group or, with dynamic context
    parallelism, a block of neighbouring data-parallel ranks."""
    if cp == parallel_state.get_context_parallel_world_size():
        return parallel_state.get_context_parallel_group()
    return parallel_state.get_hybrid_data_context_parallel_groups(group_size=cp)


def disconnect() -> None:
    """Inverse of `connect`."""
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()

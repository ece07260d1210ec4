"""What a checkpoint keeps of the learner: model, optimizer, schedule, random numbers. Readable at any layout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as torch_checkpoint
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import MegatronModule

from megatron_pbsd.learner.errors import LearnerError
from megatron_pbsd.platform import Platform


class InProcessSave(TorchDistSaveShardedStrategy):
    """Megatron's torch_dist format, written by the calling process.

    Megatron's own strategy starts a manager and writer processes for every save, even a synchronous one: seconds of
    imports, and a second run of the caller's __main__, for what is one file per rank.
    """

    def __init__(self):
        super().__init__("torch_dist", 1)

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: str) -> None:
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, self.keep_only_main_replica)
        torch_checkpoint.save(
            mcore_to_pyt_state_dict(by_key),
            storage_writer=torch_checkpoint.FileSystemWriter(checkpoint_dir, sync_files=False),
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False))


def save(
    folder: str, chunks: Sequence[MegatronModule], optimizer: MegatronOptimizer, scheduler: OptimizerParamScheduler,
    platform: Platform,
) -> None:
    """Write all ranks' parts into `folder`; every rank calls this. The files are not yet synced to disk."""
    if dist.get_rank() == 0:
        Path(folder).mkdir(parents=True, exist_ok=True)
    dist.barrier()
    state = _sharded(chunks, optimizer, is_loading=False)
    state["rng"] = _rng(platform.rng_state())
    state["scheduler"] = scheduler.state_dict()
    state["layout"] = _layout()
    state["distributed_optimizer"] = bool(_distributed(optimizer))
    dist_checkpointing.save(state, folder, InProcessSave())


def load(
    folder: str, chunks: Sequence[MegatronModule], optimizer: MegatronOptimizer, scheduler: OptimizerParamScheduler,
    platform: Platform,
) -> None:
    """Inverse of `save`, at this or another layout; every rank calls this.

    Random-number states belong to a layout: at another one they start afresh from the seed.
    """
    if not dist_checkpointing.check_is_distributed_checkpoint(folder):
        raise LearnerError(f"{folder} holds no learner state: its metadata.json is missing")
    common = dist_checkpointing.load_common_state_dict(folder)
    same_layout = common["layout"] == _layout()
    written, mine = common["distributed_optimizer"], bool(_distributed(optimizer))
    if written != mine:
        raise LearnerError(f"{folder} was written with learner.distributed_optimizer = {written}, this run has {mine}; "
                           "set it alike: Megatron-core lays the two out differently")
    state = _sharded(chunks, optimizer, is_loading=True)
    if same_layout:
        state["rng"] = _rng(None)
    loaded = dist_checkpointing.load(
        state, folder, strict=StrictHandling.RAISE_ALL if same_layout else StrictHandling.ASSUME_OK_UNEXPECTED)
    for chunk, key in zip(chunks, _keys(chunks), strict=True):
        chunk.load_state_dict(loaded[key])
    optimizer.load_state_dict(loaded["optimizer"])
    _separate_steps(optimizer)
    scheduler.load_state_dict(loaded["scheduler"])
    if same_layout:
        platform.set_rng_state(loaded["rng"])


def _sharded(chunks: Sequence[MegatronModule], optimizer: MegatronOptimizer, is_loading: bool) -> dict[str, Any]:
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
    }
    state: dict[str, Any] = {
        # Megatron writes process groups into the metadata it is given.
        key: chunk.sharded_state_dict(metadata=dict(metadata))
        for chunk, key in zip(chunks, _keys(chunks), strict=True)}
    if is_loading:
        _allocate(optimizer)
    state["optimizer"] = optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=dict(metadata))
    return state


def _keys(chunks: Sequence[MegatronModule]) -> list[str]:
    """Megatron's names for model chunks."""
    return ["model"] if len(chunks) == 1 else [f"model{i}" for i in range(len(chunks))]


def _distributed(optimizer: MegatronOptimizer) -> list[DistributedOptimizer]:
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    return [one for one in chained if isinstance(one, DistributedOptimizer)]


def _separate_steps(optimizer: MegatronOptimizer) -> None:
    """Megatron-core 0.16.1 loads one `step` tensor into all of torch Adam's states: each parameter would advance it,
    and bias correction be silently wrong."""
    for one in _distributed(optimizer):
        for held in one.optimizer.state.values():
            if torch.is_tensor(held.get("step")):
                held["step"] = held["step"].clone()


def _allocate(optimizer: MegatronOptimizer) -> None:
    """Give a distributed optimizer that has not stepped yet the state that loading writes into."""
    for one in _distributed(optimizer):
        for group in one.optimizer.param_groups:
            for parameter in group["params"]:
                if not one.optimizer.state[parameter]:
                    one.optimizer.state[parameter] = {
                        "step": torch.tensor(0.0), "exp_avg": torch.zeros_like(parameter.data),
                        "exp_avg_sq": torch.zeros_like(parameter.data)}


def _layout() -> dict[str, int]:
    return {
        "tp": parallel_state.get_tensor_model_parallel_world_size(),
        "pp": parallel_state.get_pipeline_model_parallel_world_size(),
        "vpp": parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1,
        "cp": parallel_state.get_context_parallel_world_size(),
        "dp": parallel_state.get_data_parallel_world_size(),
        "ep": parallel_state.get_expert_model_parallel_world_size(),
        "etp": parallel_state.get_expert_tensor_parallel_world_size(),
    }


def _rng(state: dict[str, Any] | None) -> ShardedObject:
    """One state per rank."""
    return ShardedObject("rng", state, (dist.get_world_size(),), (dist.get_rank(),))

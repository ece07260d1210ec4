"""Megatron-core on NVIDIA GPUs: NCCL and Transformer Engine modules."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from megatron_pbsd.platform.usage import MemoryUse, of_device

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.core.transformer.transformer_config import TransformerConfig


class Cuda:
    name = "cuda"
    backend = "nccl"
    distributed_optimizer = True
    sequence_parallel = True
    frees_pipeline_outputs = True
    transformer_engine = True

    def dtype(self, precision: str) -> torch.dtype:
        return torch.float32 if precision == "float32" else torch.bfloat16

    def device(self, rank: int) -> torch.device:
        return torch.device("cuda", rank % torch.cuda.device_count())

    def prepare(self, rank: int) -> None:
        torch.cuda.set_device(self.device(rank))

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        yield

    def transformer_flags(self) -> dict[str, Any]:
        return {
            # The output layer is Megatron's own, whose fused weight gradient needs Apex.
            "gradient_accumulation_fusion": False,
            "bias_dropout_fusion": True,
            "bias_activation_fusion": True,
            "apply_rope_fusion": True,
            "persist_layer_norm": True,
            "moe_grouped_gemm": True,
            "moe_permute_fusion": True,
            # The fused top-k has no place for prescribed experts.
            "moe_router_fusion": False,
        }

    def layer_specs(self, config: TransformerConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

        return get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=vp_stage)

    def memory_use(self, device: torch.device, held: Mapping[str, int], waiting: Mapping[str, int]) -> MemoryUse:
        return of_device(device, held)

    def seed(self, seed: int) -> None:
        from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

        torch.manual_seed(seed)
        model_parallel_cuda_manual_seed(seed)

    def rng_state(self) -> dict[str, Any]:
        from megatron.core.tensor_parallel import get_cuda_rng_tracker

        return {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(),
            "model_parallel": get_cuda_rng_tracker().get_states(),
        }

    def set_rng_state(self, state: dict[str, Any]) -> None:
        from megatron.core.tensor_parallel import get_cuda_rng_tracker

        torch.set_rng_state(state["torch"])
        torch.cuda.set_rng_state(state["cuda"])
        get_cuda_rng_tracker().set_states(state["model_parallel"])

"""What the learner needs to know about the hardware it runs on."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch

from megatron_pbsd.platform.usage import MemoryUse

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.core.transformer.transformer_config import TransformerConfig


class Platform(Protocol):
    """A device family: `cpu` or `cuda`.

    backend:  torch.distributed backend of every group.
    distributed_optimizer:   shard optimizer state over data-parallel ranks, unless the configuration decides.
    sequence_parallel:       divide activations between tensor-parallel layers, unless the configuration decides.
    frees_pipeline_outputs:  whether the interleaved schedule may free what it has sent.
    transformer_engine:      layers are Transformer Engine's, with its names for parameters.
    """

    name: str
    backend: str
    distributed_optimizer: bool
    sequence_parallel: bool
    frees_pipeline_outputs: bool
    transformer_engine: bool

    def device(self, rank: int) -> torch.device:
        """Device of a global rank."""

    def prepare(self, rank: int) -> None:
        """Before the first process group: make Megatron-core usable in this process, which is global rank `rank`."""

    def running(self) -> AbstractContextManager[None]:
        """Surrounds every call into Megatron-core, in the thread that makes it."""

    def dtype(self, precision: Literal["auto", "float32", "bfloat16"]) -> torch.dtype:
        """Of parameters and activations; optimizer state and gradients are float32 everywhere."""

    def transformer_flags(self) -> dict[str, Any]:
        """TransformerConfig fields that depend on the hardware alone."""

    def layer_specs(self, config: TransformerConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
        """Modules of this (virtual) pipeline stage's decoder layers and final norm."""

    def memory_use(self, device: torch.device, held: Mapping[str, int], waiting: Mapping[str, int]) -> MemoryUse:
        """What is in use where this rank computes. held, waiting: by the rank, on the device and on the host."""

    def seed(self, seed: int) -> None:
        """Seed every generator that model-parallel code draws from."""

    def rng_state(self) -> dict[str, Any]:
        """State of those generators."""

    def set_rng_state(self, state: dict[str, Any]) -> None:
        """Inverse of `rng_state`."""

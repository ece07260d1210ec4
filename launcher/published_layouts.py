"""Models and layouts of the bench `reshard`: sizes are those of published configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from megatron_pbsd.config import ParallelConfig
from megatron_pbsd.models.hf_config import read_file
from megatron_pbsd.models.sglang import ServerParallel

SHAPES = Path(__file__).parents[1] / "configs" / "models"


def shape(name: str) -> dict[str, Any]:
    """config.json of a published model: a file of `configs/models`, without `.json`."""
    return read_file(SHAPES / f"{name}.json")


KIMI_K2, QWEN3_8B, QWEN3_30B, LLAMA_1B, MIXTRAL, MOONLIGHT = map(shape, (
    "kimi_k2", "qwen3_8b", "qwen3_30b_a3b", "llama_3_2_1b", "mixtral_8x7b", "moonlight_16b_a3b"))
SYNTHETIC = QWEN3_30B | {
    "hidden_size": 1024, "intermediate_size": 2048, "moe_intermediate_size": 512, "num_experts": 32,
    "num_hidden_layers": 6, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 2048}
"""1.29 GB in float32, in tensors of 8 MiB at most."""
TINY_EXPERTS = QWEN3_30B | {
    "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_experts": 8, "head_dim": 16,
    "num_experts_per_tok": 2, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 2048, "max_position_embeddings": 1024, "initializer_range": 0.1}

GPUS = 256
TRILLION = {
    "tp8 pp8 ep32 → 16 x tp16 ep16": (ParallelConfig(world_size=GPUS, tp=8, pp=8, ep=32), ServerParallel(16, 16)),
    "tp8 pp8 ep32 → 16 x tp16": (ParallelConfig(world_size=GPUS, tp=8, pp=8, ep=32), ServerParallel(16)),
    "tp8 pp8 ep8 etp2 → 8 x tp32 ep32 dp32": (
        ParallelConfig(world_size=GPUS, tp=8, pp=8, ep=8, etp=2), ServerParallel(32, 32, dp_attention=32)),
    "tp4 pp16 ep16 → 16 x tp8 ep8 pp2": (
        ParallelConfig(world_size=GPUS, tp=4, pp=16, ep=16), ServerParallel(8, 8, pp=2)),
}


class Pair(NamedTuple):
    config: dict[str, Any]
    parallel: ParallelConfig
    server: ServerParallel
    servers: int
    colocated: bool = True


def _learner(world_size: int, tp: int, **sizes: int) -> ParallelConfig:
    return ParallelConfig(world_size=world_size, tp=tp, **sizes)


PAIRS = {
    "dense, tp 8 → tp 4": Pair(QWEN3_8B, _learner(8, 8), ServerParallel(4), 2),
    "dense, tp 2 dp 4 → tp 1": Pair(QWEN3_8B, _learner(8, 2), ServerParallel(1), 8),
    "key-value heads on two ranks each": Pair(QWEN3_8B, _learner(16, 4, pp=2), ServerParallel(16), 1),
    "tied embeddings over stages": Pair(LLAMA_1B, _learner(8, 2, pp=4), ServerParallel(4, pp=2), 1),
    "uneven stages, interleaved": Pair(QWEN3_8B, _learner(8, 1, pp=8, vpp=2), ServerParallel(2, pp=4), 1),
    "experts: ep 8 → tp 8": Pair(QWEN3_30B, _learner(16, 4, ep=8), ServerParallel(8), 2),
    "experts: ep 4 etp 2 → ep 8": Pair(MIXTRAL, _learner(16, 8, ep=4, etp=2), ServerParallel(8, 8), 2),
    "experts: other GPUs": Pair(QWEN3_30B, _learner(8, 2, pp=2, ep=4), ServerParallel(4, 2), 2, colocated=False),
    "latent attention": Pair(MOONLIGHT, _learner(16, 4, pp=2, ep=8), ServerParallel(8, 4), 2),
    "latent attention, attention replicas": Pair(
        MOONLIGHT, _learner(8, 2, ep=8), ServerParallel(8, 8, dp_attention=8), 1),
}

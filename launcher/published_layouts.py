"""Models and layouts of the bench `reshard`: sizes are those of published configurations."""

from __future__ import annotations

from typing import Any, NamedTuple

from megatron_pbsd.config import ParallelConfig
from megatron_pbsd.models.sglang import ServerParallel

COMMON: dict[str, Any] = {
    "attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu", "initializer_range": 0.02,
    "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": False}
QWEN3 = COMMON | {"model_type": "qwen3", "head_dim": 128, "vocab_size": 151936}
QWEN3_MOE = QWEN3 | {
    "model_type": "qwen3_moe", "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True,
    "num_experts_per_tok": 8}
LATENT = COMMON | {
    "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "moe_intermediate_size": 2048, "n_shared_experts": 1, "num_experts_per_tok": 8, "norm_topk_prob": True,
    "hidden_size": 7168, "intermediate_size": 18432, "num_hidden_layers": 61, "num_nextn_predict_layers": 0,
    "rope_scaling": None}
KIMI_K2 = LATENT | {
    "model_type": "kimi_k2", "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "n_routed_experts": 384,
    "num_attention_heads": 64, "num_key_value_heads": 64, "routed_scaling_factor": 2.827, "vocab_size": 163840}
QWEN3_8B = QWEN3 | {
    "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
    "num_key_value_heads": 8}
QWEN3_30B = QWEN3_MOE | {
    "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128,
    "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4}
LLAMA_1B = COMMON | {
    "model_type": "llama", "mlp_bias": False, "head_dim": 64, "hidden_size": 2048, "intermediate_size": 8192,
    "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True,
    "vocab_size": 128256}
MIXTRAL = {name: value for name, value in COMMON.items() if name != "attention_bias"} | {
    "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2,
    "vocab_size": 32000}
MOONLIGHT = LATENT | {
    "model_type": "deepseek_v3", "hidden_size": 2048, "intermediate_size": 11264, "moe_intermediate_size": 1408,
    "n_shared_experts": 2, "num_experts_per_tok": 6, "num_hidden_layers": 27, "q_lora_rank": None,
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "n_routed_experts": 64, "num_attention_heads": 16,
    "num_key_value_heads": 16, "routed_scaling_factor": 2.446, "vocab_size": 163840}
SYNTHETIC = QWEN3_MOE | {
    "hidden_size": 1024, "intermediate_size": 2048, "moe_intermediate_size": 512, "num_experts": 32,
    "num_hidden_layers": 6, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 8192}
"""1.34 GB in float32."""
TINY_EXPERTS = QWEN3_MOE | {
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

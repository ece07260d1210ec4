"""Published training runs that the bench `planning` predicts: layouts with what was measured of them, and recipes.

None of the planner's constants was chosen by these.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from launcher.published_layouts import KIMI_K2, QWEN3_30B
from megatron_pbsd.config import ParallelConfig
from megatron_pbsd.models import family
from megatron_pbsd.models.decoder import Decoder
from megatron_pbsd.planning.activations import Kernels, Recompute
from megatron_pbsd.planning.memory import Layout, Numerics


@dataclass(frozen=True)
class Run:
    """batch: sequences of an optimizer step, of `length` positions. fits: None where a source says nothing. mfu: share
    of the peak; what is computed again does not count, unless `again`."""

    source: str
    decoder: Decoder
    gpu: str
    layout: Layout
    numerics: Numerics
    length: int
    batch: int
    fits: bool | None = True
    mfu: float | None = None
    again: bool = False
    seconds: float | None = None


def plain(layers: int, hidden: int, heads: int, inner: int, vocabulary: int) -> Decoder:
    return Decoder(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, head_dim=hidden // heads, max_position_embeddings=8192,
        rms_norm_eps=1e-6, initializer_range=0.02, attention_dropout=0.0, tie_word_embeddings=False, rope_theta=1e4,
        qk_norm=False)


def gpt(layers: int, hidden: int, heads: int) -> Decoder:
    """An MLP of 4 h units has as many parameters, operations and activations as a gated one of 8 h / 3."""
    return plain(layers, hidden, heads, -(-8 * hidden // 3 // 64) * 64, 51200)


def _layout(
    gpus: int, tokens: int, recompute: Recompute, sequence: bool = False, whole_logits: bool = True, **sizes: int
) -> Layout:
    return Layout(ParallelConfig(**{"world_size": gpus, "tp": 1} | sizes), tokens, recompute,
                  tokens if whole_logits else 1024, sequence)


LLAMA_13B, LLAMA_30B, LLAMA_65B = (
    plain(40, 5120, 40, 13824, 128000), plain(60, 6656, 52, 17920, 128000), plain(80, 8192, 64, 22016, 128000))
HAGEMANN = (
    ("Llama-13B, 2k", LLAMA_13B, 64, 2048, 2048, "none",
     "1,1,1:70.6 1,1,2:60.3 1,2,1:59.8 1,2,2:53.7 2,1,1:oom 2,1,2:56.5 2,2,1:63.0 2,2,2:53.4 4,1,1:oom 4,1,2:oom "
     "4,2,1:oom 4,2,2:49.8 8,1,1:oom 8,1,2:oom 8,2,1:oom 8,2,2:oom"),
    ("Llama-13B, 2k", LLAMA_13B, 64, 2048, 2048, "full",
     "1,1,1:49.9 1,1,2:42.4 1,2,1:39.7 2,1,1:51.0 2,1,2:39.5 2,2,1:42.1 2,2,2:34.9 4,1,1:51.0 4,1,2:33.6 4,2,1:42.4 "
     "4,2,2:33.1 8,1,2:25.7 8,2,1:43.3 8,2,2:28.6"),
    ("Llama-13B, 8k", LLAMA_13B, 128, 8192, 512, "none",
     "1,1,1:oom 1,1,2:oom 1,1,4:oom 1,2,1:oom 1,2,2:59.4 1,2,4:56.6 1,4,1:51.2 1,4,2:49.9 1,4,4:46.9 2,1,1:oom "
     "2,1,2:oom 2,1,4:oom 2,2,1:oom 2,2,2:oom 2,2,4:oom 2,4,1:oom 2,4,2:oom 2,4,4:46.3 4,1,1:oom 4,1,2:oom 4,1,4:oom "
     "4,2,1:oom 4,2,2:oom 4,2,4:oom 4,4,1:oom 4,4,2:oom 4,4,4:oom"),
    ("Llama-13B, 8k", LLAMA_13B, 128, 8192, 512, "full",
     "1,1,1:38.9 1,1,2:44.4 1,1,4:41.8 1,2,1:41.1 1,2,2:39.9 1,2,4:38.9 1,4,1:33.6 1,4,2:31.5 1,4,4:29.9 2,1,1:oom "
     "2,1,2:39.7 2,1,4:37.6 2,2,1:oom 2,2,2:37.5 2,2,4:36.4 2,4,1:34.0 2,4,2:31.6 2,4,4:30.3 4,1,1:oom 4,1,2:oom "
     "4,1,4:oom 4,2,1:oom 4,2,2:oom 4,2,4:oom 4,4,1:oom 4,4,2:oom 4,4,4:oom"),
    ("Llama-30B, 2k", LLAMA_30B, 256, 2048, 2048, "none",
     "1,1,1:oom 1,1,2:oom 1,1,4:46.8 1,2,1:oom 1,2,2:39.4 1,2,4:49.2 1,4,1:35.1 1,4,2:41.4 1,4,4:42.5 2,1,1:oom "
     "2,1,2:oom 2,1,4:oom 2,2,1:oom 2,2,2:oom 2,2,4:46.0 2,4,1:31.6 2,4,2:42.5 2,4,4:44.1 4,1,1:oom 4,1,2:oom "
     "4,1,4:oom 4,2,1:oom 4,2,2:oom 4,2,4:oom 4,4,1:oom 4,4,2:oom 4,4,4:44.5"),
    ("Llama-30B, 2k", LLAMA_30B, 256, 2048, 2048, "full",
     "1,1,1:oom 1,1,2:31.8 1,1,4:38.4 1,2,1:28.1 1,2,2:34.9 1,2,4:35.1 1,4,1:25.3 1,4,2:27.8 1,4,4:27.2 2,1,1:oom "
     "2,1,2:29.6 2,1,4:37.5 2,2,1:oom 2,2,2:34.6 2,2,4:35.8 2,4,1:26.5 2,4,2:28.2 2,4,4:29.0 4,1,1:oom 4,1,2:oom "
     "4,1,4:32.6 4,2,1:oom 4,2,2:32.4 4,2,4:33.1 4,4,1:25.4 4,4,2:30.1 4,4,4:29.1"),
    ("Llama-65B, 2k", LLAMA_65B, 128, 2048, 2048, "none",
     "1,2,2:oom 1,2,4:55.3 1,2,8:55.1 1,4,2:50.3 1,4,4:50.6 1,4,8:47.3 1,8,2:40.6 1,8,4:39.2 1,8,8:35.9 2,2,2:oom "
     "2,2,4:oom 2,2,8:oom 2,4,2:oom 2,4,4:52.9 2,4,8:50.6 2,8,2:43.3 2,8,4:42.5 2,8,8:37.9 4,2,2:oom 4,2,4:oom "
     "4,2,8:oom 4,4,2:oom 4,4,4:oom 4,4,8:oom 4,8,2:oom 4,8,4:oom 4,8,8:oom"),
    ("Llama-65B, 2k", LLAMA_65B, 128, 2048, 2048, "full",
     "1,2,2:36.9 1,2,4:39.4 1,2,8:37.0 1,4,2:32.1 1,4,4:31.1 1,4,8:28.0 1,8,2:22.7 1,8,4:20.9 1,8,8:18.4 2,2,2:oom "
     "2,2,4:40.8 2,2,8:38.9 2,4,4:33.8 2,4,8:30.9 2,8,2:25.1 2,8,4:24.2 2,8,8:21.6 4,2,2:oom 4,2,4:40.2 4,2,8:38.3 "
     "4,4,2:34.6 4,4,4:35.0 4,4,8:32.8 4,8,2:26.7 4,8,4:25.9 4,8,8:23.7"),
)
"""Hagemann et al., arXiv 2311.05610, by their tables in github.com/Aleph-Alpha/NeurIPS-WANT-submission-efficient-
parallelization-layouts (data/*_all_runs.xlsx): micro-batch, tp, pp: MFU in per cent, or out of memory. Of runs without
recomputation those with FlashAttention-2 and their RMSNorm kernel, of those that recompute every layer the ones with
FlashAttention-2. A100-80GB, no sequence parallelism, optimizer divided. Gradients are in 16 bits: otherwise the best
run of 13B could not have fitted. Vocabulary and batch follow from step times and MFU."""
BFLOAT16_GRADIENTS = Numerics(gradient=2)


def hagemann() -> Iterator[Run]:
    for name, decoder, gpus, length, batch, recompute, cells in HAGEMANN:
        for cell in cells.split():
            sizes, _, measured = cell.partition(":")
            size, tp, pp = map(int, sizes.split(","))
            mfu = None if measured == "oom" else float(measured) / 100
            yield Run(name, decoder, "a100-80g", _layout(gpus, size * length, recompute, tp=tp, pp=pp),
                      BFLOAT16_GRADIENTS, length, batch, mfu is not None, mfu)


NARAYANAN = (
    (24, 2304, 24, 1, 1, 32, 512, 137), (30, 3072, 32, 2, 1, 64, 512, 138), (36, 4096, 32, 4, 1, 128, 512, 142),
    (40, 6144, 48, 8, 1, 256, 1024, 135), (48, 8192, 64, 8, 2, 512, 1536, 138), (60, 10240, 80, 8, 4, 1024, 1792, 140),
    (80, 12288, 96, 8, 8, 1536, 2304, 148), (96, 16384, 128, 8, 16, 1920, 2160, 155),
    (105, 20480, 128, 8, 35, 2520, 2520, 163), (128, 25600, 160, 8, 64, 3072, 3072, 163))
"""arXiv 2104.04473, table 1: layers, hidden size, heads, tp, pp, GPUs, batch, TFLOP/s for each GPU with what is
recomputed. Sequences of 2048, vocabulary 51 200, A100-80GB. It does not say which micro-batches and how many model
chunks: one sequence and one chunk are assumed. Its optimizer is not divided."""
KORTHIKANTI = (
    (48, 6144, 64, 8, 1, 1, 8, 4, 4, 1.42, 1.10), (96, 12288, 96, 8, 8, 3, 64, 64, 1, 18.13, 13.75),
    (105, 20480, 128, 8, 35, 3, 280, 280, 1, 49.05, 37.83), (128, 25600, 160, 8, 64, 1, 512, 512, 1, 94.42, 71.49))
"""arXiv 2205.05198, tables 3 and 5: layers, hidden size, heads, tp, pp, vpp, GPUs, batch, micro-batch; seconds of an
iteration with all layers recomputed, and with sequence parallelism and attention recomputed."""
GPT = Numerics(divided=False, kernels=Kernels(flash=False, dropout=True))


def narayanan() -> Iterator[Run]:
    for layers, hidden, heads, tp, pp, gpus, batch, tera in NARAYANAN:
        decoder = gpt(layers, hidden, heads)
        yield Run(f"GPT, {layers} layers of {hidden}", decoder, "a100-80g",
                  _layout(gpus, 2048, "full", tp=tp, pp=pp), GPT, 2048, batch, mfu=tera / 312, again=True)


def korthikanti() -> Iterator[Run]:
    for layers, hidden, heads, tp, pp, vpp, gpus, batch, size, full, selective in KORTHIKANTI:
        decoder = gpt(layers, hidden, heads)
        for recompute, seconds in (("full", full), ("selective", selective)):
            layout = _layout(gpus, 2048 * size, recompute, sequence=recompute == "selective", tp=tp, pp=pp, vpp=vpp)
            yield Run(f"GPT, {layers} layers of {hidden}", decoder, "a100-80g", layout, GPT, 2048, batch,
                      seconds=seconds)


@dataclass(frozen=True)
class Recipe:
    """A peer's, which is said to run."""

    name: str
    config: dict
    layout: Layout
    length: int
    numerics: Numerics = field(default_factory=Numerics)


QWEN3_235B = QWEN3_30B | {
    "hidden_size": 4096, "intermediate_size": 12288, "moe_intermediate_size": 1536, "num_hidden_layers": 94,
    "num_attention_heads": 64}
DEEPSEEK_V3 = KIMI_K2 | {
    "model_type": "deepseek_v3", "num_attention_heads": 128, "num_key_value_heads": 128, "n_routed_experts": 256,
    "first_k_dense_replace": 3, "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5, "vocab_size": 129280}
OFFLOADED = Numerics(offloaded=True)
RECIPES = (
    Recipe("NeMo-RL grpo-qwen3-30ba3b-4n8g", QWEN3_30B, _layout(32, 4096, "none", ep=8), 4096, BFLOAT16_GRADIENTS),
    Recipe("NeMo-RL grpo-qwen3-235b-16n8g", QWEN3_235B,
           _layout(128, 4096, "full", True, tp=2, pp=8, cp=2, ep=16), 8192, BFLOAT16_GRADIENTS),
    Recipe("NeMo-RL grpo-deepseek-v3-32n8g", DEEPSEEK_V3, _layout(256, 1536, "full", pp=16, ep=16), 1536,
           BFLOAT16_GRADIENTS),
    Recipe("slime run-qwen3-30B-A3B", QWEN3_30B, _layout(8, 20480, "full", True, tp=4, ep=8), 20480, OFFLOADED),
    Recipe("slime run-qwen3-235B-A22B", QWEN3_235B,
           _layout(64, 16384, "full", True, tp=4, pp=4, cp=2, ep=16), 16384, OFFLOADED),
    Recipe("slime run-deepseek-r1", DEEPSEEK_V3,
           _layout(128, 16384, "full", True, tp=8, pp=4, cp=4, ep=32), 32768, OFFLOADED),
    Recipe("slime run-kimi-k2-Instruct", KIMI_K2,
           _layout(256, 16384, "full", True, tp=8, pp=8, cp=4, ep=32), 32768, OFFLOADED))
"""github.com/NVIDIA-NeMo/RL, examples/configs/recipes/llm/performance (7ea279a), with gradients in 16 bits as in
grpo_math_1B.yaml; github.com/THUDM/slime, scripts (57f3c59, 4a2812e, 128cb0e), with the optimizer in host memory.
Layers are divided over stages as here, not by the recipes' own numbers."""


def decoder_of(recipe: Recipe) -> Decoder:
    return family(recipe.config).decoder(recipe.config)

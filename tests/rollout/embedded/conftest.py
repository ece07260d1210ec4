"""Tiny random models on disk, one per family, and engines over them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from megatron_pbsd.rollout.engines.embedded.engine import EmbeddedEngine

SHAPE = dict(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=1024,
    # Wide enough that the next token is neither certain nor uniform.
    initializer_range=0.15,
)
MIXTURE = dict(moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2)
LATENT = dict(
    num_key_value_heads=4,
    head_dim=8,
    q_lora_rank=24,
    kv_lora_rank=16,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=12,
    n_group=1,
    topk_group=1,
    n_shared_experts=1,
    first_k_dense_replace=1,
    rope_parameters=dict(rope_type="yarn", rope_theta=10000.0, factor=8.0, original_max_position_embeddings=128,
                         mscale=0.7, mscale_all_dim=1.0),
)
LLAMA3 = dict(rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=64)
FAMILIES = {
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, tie_word_embeddings=True)),
    "qwen3_untied": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, tie_word_embeddings=False)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**SHAPE, **MIXTURE)),
    "deepseek_v3": lambda: DeepseekV3ForCausalLM(DeepseekV3Config(**SHAPE | LATENT, **MIXTURE)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(
        **SHAPE | dict(num_key_value_heads=4), bos_token_id=1, rope_parameters=LLAMA3)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE, tie_word_embeddings=True)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=None)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SHAPE, num_local_experts=4)),
}


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Family → folder with a saved model."""
    root = tmp_path_factory.mktemp("models")
    for family, build in FAMILIES.items():
        torch.manual_seed(0)
        build().save_pretrained(root / family)
    return {family: root / family for family in FAMILIES}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def make_engine(folders):
    def make(family: str = "qwen3", *, name: str = "test-engine", slots: int = 8, max_context: int = 256,
             **arguments) -> EmbeddedEngine:
        return EmbeddedEngine(
            str(folders[family]), name=name, slots=slots, max_context=max_context, **arguments)

    return make


@pytest.fixture
def reference(folders):
    """The same model under transformers' own attention and cache."""

    def load(family: str = "qwen3") -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(folders[family], attn_implementation="eager").eval()

    return load


@pytest.fixture
def prompts() -> list[tuple[int, ...]]:
    """Sixteen prompts of 1 to 76 tokens."""
    generator = torch.Generator().manual_seed(1)
    return [tuple(torch.randint(96, (5 * i + 1,), generator=generator).tolist()) for i in range(16)]

from __future__ import annotations

import os

import pytest
from rank_pool import RankPool
from tiny_models import make_tiny

MODELS = {
    "tied": ("qwen3", {"tie_word_embeddings": True, "num_hidden_layers": 8}),
    "untied": ("qwen3", {"num_hidden_layers": 4}),
    "odd": ("qwen3", {"tie_word_embeddings": True, "vocab_size": 131, "num_hidden_layers": 5}),
    "moe": ("qwen3_moe", {}),
    "glm": ("glm4_moe", {}),
    "deepseek": ("deepseek_v3", {}),
    "deepseek-plain": ("deepseek_v3", {
        "q_lora_rank": None, "rope_interleave": False, "n_group": 1, "topk_group": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
}
"""name → family and what differs from its tiny model; eight layers are four pipeline ranks of two chunks each."""


@pytest.fixture(scope="module")
def ranks():
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    pool = RankPool(4)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """name → folder of a tiny model that transformers made."""
    return {name: make_tiny(family, tmp_path_factory.mktemp(name), **changes)
            for name, (family, changes) in MODELS.items()}

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from rank_pool import RankPool


@pytest.fixture(scope="session")
def ranks():
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    pool = RankPool(4)
    yield pool
    pool.close()


TINY = {
    "model_type": "qwen3", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6, "initializer_range": 0.1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}


@pytest.fixture(scope="session")
def hf_folders(tmp_path_factory) -> dict[bool, Path]:
    """tie_word_embeddings → folder of a tiny model that transformers made, every weight away from its default."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    folders = {}
    for tied in (True, False):
        torch.manual_seed(int(tied))
        model = Qwen3ForCausalLM(Qwen3Config(**TINY, tie_word_embeddings=tied))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
        folders[tied] = tmp_path_factory.mktemp("tied" if tied else "untied")
        model.save_pretrained(folders[tied])
        assert json.loads((folders[tied] / "config.json").read_text())["tie_word_embeddings"] is tied
    return folders

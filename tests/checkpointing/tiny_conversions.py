"""Tiny models as Hugging Face folders and as checkpoints, and ways to change them."""

from __future__ import annotations

import json
import shutil

import torch
from safetensors.torch import load_file, save_file
from tiny_models import TINY

from megatron_pbsd.config import ParallelConfig

SMALL = {"piece_bytes": 1000}
MODELS = {name: (name, {}) for name in TINY} | {
    "odd": ("qwen3", {"tie_word_embeddings": True, "vocab_size": 131, "num_hidden_layers": 5}),
    "halves": ("deepseek_v3", {"rope_interleave": False}),
    "halves of one matrix": ("deepseek_v3", {"rope_interleave": False, "q_lora_rank": None})}
"""name → family, and what differs from its tiny model."""
DENSE = ParallelConfig(world_size=4, tp=2, pp=2)
LAYOUTS = {
    "mixtral": ParallelConfig(world_size=4, tp=2, ep=4),
    "qwen3_moe": ParallelConfig(world_size=4, tp=1, pp=2, vpp=2, ep=2),
    "glm4_moe": ParallelConfig(world_size=4, tp=2, ep=2, pp=2)}
"""DENSE for the others."""


def weights(folder):
    found = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def assert_same(a, b):
    one, other = weights(a), weights(b)
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]), name


def copy(folder, target):
    shutil.copytree(folder, target)
    return target


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def change_weights(folder, change):
    found = weights(folder)
    change(found)
    save_file(found, folder / "model.safetensors")

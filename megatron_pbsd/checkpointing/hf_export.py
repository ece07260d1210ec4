"""A policy as a Hugging Face folder that `transformers`, engines and learners load."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

CARRIED = (
    "config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json")


def export_hf(tensors: Mapping[str, torch.Tensor], origin: Path, folder: Path) -> None:
    """Write `tensors` (Hugging Face names) with the configuration and tokenizer of `origin`; complete or not at all."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, partial / "model.safetensors",
              metadata={"format": "pt"})
    for name in CARRIED:
        if (origin / name).is_file():
            shutil.copy(origin / name, partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)

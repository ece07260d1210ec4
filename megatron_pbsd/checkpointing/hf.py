"""A policy as a folder in Hugging Face format."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json")


def export(tensors: Mapping[str, torch.Tensor], source: str | Path, target: str | Path) -> None:
    """Write `tensors` (Hugging Face names) into `target`, beside the config and tokenizer files of `source`.

    The folder appears complete or not at all; an older one of that name is replaced.
    """
    source, target = Path(source), Path(target)
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for path in source.iterdir():
        if path.is_file() and not any(path.match(pattern) for pattern in WEIGHTS):
            shutil.copyfile(path, partial / path.name)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial / "model.safetensors",
              metadata={"format": "pt"})
    for path in partial.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)

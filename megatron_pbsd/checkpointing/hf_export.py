"""A policy as a Hugging Face folder that `transformers`, engines and learners load."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from megatron_pbsd.checkpointing.hf_folder import SINGLE, HfFile, carry


def export_hf(tensors: Mapping[str, torch.Tensor], origin: Path, folder: Path) -> None:
    """Write `tensors` (Hugging Face names) with the configuration and tokenizer of `origin`; complete or not at all."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    file = HfFile(partial / SINGLE, {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()})
    for tensor in tensors.values():
        file.write(tensor)
    file.close()
    carry(origin, partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)

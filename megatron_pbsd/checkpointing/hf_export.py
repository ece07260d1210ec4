"""A policy as a Hugging Face folder that `transformers`, engines and learners load."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from megatron_pbsd.checkpointing.torch_dist import Reader
from megatron_pbsd.models import family
from megatron_pbsd.models.decoder import hf_tensors
from megatron_pbsd.models.dist_checkpoint import Place, places

CARRIED = (
    "config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json")
SHARED_BY_LAYERS = "decoder.layers.self_attention.linear_proj.weight"


def export_checkpoint(learner: Path, origin: Path, folder: Path) -> None:
    """`export_hf` of the model in the distributed checkpoint `learner`, which nobody changes meanwhile.

    CheckpointError naming the tensor that the checkpoint lacks, or has in part.
    """
    reader, hf = Reader(learner), json.loads((origin / "config.json").read_text())
    decoder = family(hf).decoder(hf)
    shapes, found = hf_tensors(decoder), places(decoder, layer_axis=SHARED_BY_LAYERS in reader.tensors)
    export_hf({name: _whole(reader, shape, found[name]) for name, shape in shapes.items()}, origin, folder)


def export_hf(tensors: Mapping[str, torch.Tensor], origin: Path, folder: Path) -> None:
    """Write `tensors` (Hugging Face names), no two of which share memory, with the configuration and tokenizer of
    `origin`; complete or not at all."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(dict(tensors), partial / "model.safetensors", metadata={"format": "pt"})
    for name in CARRIED:
        if (origin / name).is_file():
            shutil.copy(origin / name, partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def _whole(reader: Reader, shape: tuple[int, ...], parts: list[Place]) -> torch.Tensor:
    made = None
    for place in parts:
        size = [s.stop - s.start for s in place.hf_index]
        stored = [1] * (len(place.shape) - len(size)) + [(size[0] - 1) * place.step + 1, *size[1:]]
        values = reader.read(place.key, tuple(slice(o, o + n) for o, n in zip(place.offset, stored, strict=True)))
        values = values.view(stored[len(stored) - len(size):])[:: place.step]
        made = torch.empty(shape, dtype=values.dtype) if made is None else made
        made[place.hf_index] = values
    return made

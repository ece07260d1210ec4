"""What is in a Hugging Face folder or a checkpoint, without reading its tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from megatron_pbsd.checkpointing.conversion.locate import is_hf, locate, model_config
from megatron_pbsd.checkpointing.errors import CheckpointError
from megatron_pbsd.checkpointing.hf_folder import HfFolder
from megatron_pbsd.checkpointing.torch_dist import Reader
from megatron_pbsd.errors import PbsdError
from megatron_pbsd.models.hf_config import read


@dataclass(frozen=True)
class TensorSummary:
    """parts: into how many it is divided. files: where they are."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    parts: int
    files: tuple[str, ...]


@dataclass(frozen=True)
class Summary:
    """kind: 'huggingface' or 'megatron'. model_type, step, layout: as far as the folder says, else None.
    files: name → bytes. objects: how many things it has that are no tensors."""

    kind: str
    folder: str
    model_type: str | None
    step: int | None
    layout: dict[str, Any] | None
    files: dict[str, int]
    tensors: list[TensorSummary]
    objects: int = 0

    @property
    def elements(self) -> int:
        """Of all tensors, optimizer state included."""
        return sum(prod(tensor.shape) for tensor in self.tensors)


def inspect(folder: Path, config: Path | None = None) -> Summary:
    """ModelError or CheckpointError when the folder is neither, or its index is damaged."""
    return _hf(folder) if is_hf(folder) else _checkpoint(locate(folder), config)


def _hf(folder: Path) -> Summary:
    opened = HfFolder(folder)
    tensors = [TensorSummary(name, _name(t.dtype), t.shape, t.nbytes, 1, (t.file,))
               for name, t in opened.tensors.items()]
    return Summary("huggingface", str(folder), _model_type(lambda: read(folder)), None, None,
                   _sizes(folder, tensors), tensors)


def _checkpoint(folder: Path, config: Path | None) -> Summary:
    reader = Reader(folder)
    tensors = [
        TensorSummary(key, _name(t.dtype), t.shape, prod(t.shape) * t.dtype.itemsize, len(t.parts),
                      tuple(sorted({part.file for part in t.parts})))
        for key, t in sorted(reader.tensors.items())]
    try:
        common = reader.common()
    except CheckpointError:
        common = {}
    layout = common.get("layout")
    return Summary("megatron", str(folder), _model_type(lambda: model_config(folder, config)[0]),
                   _step(folder, common), dict(layout) if isinstance(layout, Mapping) else None,
                   _sizes(folder, tensors), tensors, len(reader.objects))


def _step(folder: Path, common: Mapping[str, Any]) -> int | None:
    """By the manifest of a run's checkpoint, or by Megatron-LM's count."""
    manifest = folder.parent / "manifest.json"
    if folder.name == "learner" and manifest.is_file():
        found = json.loads(manifest.read_text())
        return found.get("step", found.get("contents", {}).get("step"))
    return common.get("iteration")


def _sizes(folder: Path, tensors: list[TensorSummary]) -> dict[str, int]:
    names = sorted({file for tensor in tensors for file in tensor.files})
    return {name: (folder / name).stat().st_size if (folder / name).is_file() else 0 for name in names}


def _model_type(config: Any) -> str | None:
    try:
        return config().get("model_type")
    except PbsdError:
        return None


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")

"""Finds the checkpoint in a folder, and the model it is of.

A folder may be a checkpoint itself; what Megatron-LM's --load takes (latest_checkpointed_iteration.txt beside
iter_0000123/ or release/); or a run's checkpoints (latest beside step_40/), of which the learner's part is meant.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import xxhash

from megatron_pbsd.checkpointing.block_scaled import read_plain
from megatron_pbsd.checkpointing.errors import CheckpointError
from megatron_pbsd.checkpointing.hf_folder import CHECKSUMS, INDEX, SINGLE
from megatron_pbsd.checkpointing.torch_dist import COMMON, SUFFIX, Reader
from megatron_pbsd.checkpointing.torch_dist_index import BACKEND, METADATA
from megatron_pbsd.models import family

TRACKER, RELEASE = "latest_checkpointed_iteration.txt", "release"
HF = "hf"
"""Where our checkpoints keep configuration and tokenizer."""
CONFIG = "model"
"""Or, in what is the same on all ranks, the configuration alone."""
BESIDE = (METADATA, BACKEND, COMMON)


def locate(folder: Path) -> Path:
    """The folder with metadata.json. CheckpointError when there is none."""
    if (folder / BACKEND).is_file():
        return folder
    for pointer, name in ((TRACKER, _megatron_name), ("latest", str)):
        if (folder / pointer).is_file():
            inner = folder / name((folder / pointer).read_text(errors="replace").strip())
            if inner.is_dir():
                return locate(inner)
            raise CheckpointError(f"{folder / pointer} names {inner.name}, which does not exist")
    if (folder / "learner" / BACKEND).is_file():
        return folder / "learner"
    inside = sorted(path.parent.name for name in (BACKEND, TRACKER, "latest") for path in folder.glob(f"*/{name}"))
    raise CheckpointError(
        f"{folder} is no checkpoint: it has neither {BACKEND} nor {TRACKER}"
        + ("" if folder.is_dir() else "; it does not exist")
        + (f"; did you mean {', '.join(inside)}?" if inside else ""))


def is_hf(folder: Path) -> bool:
    """Whether a folder holds a model in Hugging Face format."""
    return any((folder / name).is_file() for name in ("config.json", SINGLE, INDEX))


def model_config(checkpoint: Path, given: Path | None) -> tuple[dict[str, Any], Path | None]:
    """config.json of the model that a checkpoint is of, and the folder it is in, if any: the one that is given, or the
    one that the checkpoint keeps. CheckpointError when there is none, or these two are of different families."""
    kept, folder = None, checkpoint / HF
    if folder.is_dir():
        kept = read_plain(folder)
    elif given is None or (checkpoint / COMMON).is_file():
        folder, common = None, Reader(checkpoint).common() if given is None else _common(checkpoint)
        kept = dict(common[CONFIG]) if isinstance(common.get(CONFIG), Mapping) else None
    if given is not None:
        hf = read_plain(given)
        if kept is not None:
            _require_same_model(hf, kept, given, checkpoint)
        return hf, given
    if kept is None:
        raise CheckpointError(f"{checkpoint} does not say what model it is of: name a Hugging Face folder of that "
                              "model with --config")
    return kept, folder


def recorded(checkpoint: Path) -> dict[str, dict[str, str]]:
    """What a checkpoint's checksums.json says of its 'files' and Hugging Face 'tensors'; empty where there is none."""
    path = checkpoint / CHECKSUMS
    try:
        found = json.loads(path.read_text()) if path.is_file() else {}
        return {kind: dict(found.get(kind, {})) for kind in ("files", "tensors")}
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def changed_index(checkpoint: Path) -> list[str]:
    """Files of a checkpoint besides its parts whose content is not what checksums.json says."""
    known = recorded(checkpoint)["files"]
    return [f"{checkpoint / name} is missing or damaged: its checksum is not what {CHECKSUMS} says"
            for name in known if not name.endswith(SUFFIX) and _checksum(checkpoint / name) != known[name]]


def write_checksums(checkpoint: Path, parts: Mapping[str, str], tensors: Mapping[str, str]) -> None:
    """Of a checkpoint's files (xxh3_128 of their content; `parts` has those of the large ones), configuration and
    tokenizer included, and of the Hugging Face tensors in them."""
    beside = [*BESIDE, *(f"{HF}/{path.name}" for path in sorted((checkpoint / HF).glob("*")))]
    (checkpoint / CHECKSUMS).write_text(json.dumps({
        "xxh3_128": "of each file, and of each Hugging Face tensor's bytes",
        "files": dict(parts) | {name: _checksum(checkpoint / name) for name in beside},
        "tensors": dict(tensors)}, indent=1))


def with_dtype(hf: dict[str, Any], dtype: str | None) -> dict[str, Any]:
    """config.json of the same model with its weights stored as `dtype`; None leaves it as it is."""
    if dtype is None:
        return hf
    return {name: value for name, value in hf.items() if name != "torch_dtype"} | {"dtype": dtype}


def write_config(folder: Path, hf: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(hf, indent=2) + "\n")


def _require_same_model(hf: dict[str, Any], kept: dict[str, Any], given: Path, checkpoint: Path) -> None:
    """CheckpointError naming all that changes the mathematics."""
    if hf.get("model_type") != kept.get("model_type"):
        raise CheckpointError(f"{given} is of a {hf.get('model_type')} model, {checkpoint} of a "
                              f"{kept.get('model_type')} one")
    mine, theirs = family(hf).decoder(hf), family(kept).decoder(kept)
    differing = [f"{field.name} = {getattr(mine, field.name)}, not {getattr(theirs, field.name)}"
                 for field in fields(mine) if getattr(mine, field.name) != getattr(theirs, field.name)]
    if differing:
        raise CheckpointError(f"{given} is another model than {checkpoint} is of: {'; '.join(differing)}; without "
                              "--config the checkpoint's own is used")


def _checksum(path: Path) -> str | None:
    return xxhash.xxh3_128(path.read_bytes()).hexdigest() if path.is_file() else None


def _common(checkpoint: Path) -> dict[str, Any]:
    """Empty where it has objects of Megatron-LM's, which only Megatron-LM can read."""
    try:
        return Reader(checkpoint).common()
    except CheckpointError:
        return {}


def _megatron_name(iteration: str) -> str:
    return f"iter_{int(iteration):07}" if iteration.isdigit() else RELEASE

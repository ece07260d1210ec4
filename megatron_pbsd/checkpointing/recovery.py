"""Weights that were read back from the engines when the learner was lost, beside the run's checkpoints.

    <checkpoints>/recovered/…               a Hugging Face folder
    <checkpoints>/recovered/tensors.json    each tensor's checksum (resharding/checksum.py) from when it was published
    <checkpoints>/recovered/manifest.json   after which step these are the weights; every file's size and checksum
    <checkpoints>/recovered_step_7/…        was `recovered`, until a run went on from a checkpoint alone

A run that goes on from them takes everything else from its newest checkpoint.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from megatron_pbsd.checkpointing.errors import CheckpointError, named
from megatron_pbsd.checkpointing.files import sync, write_synced
from megatron_pbsd.checkpointing.hf_export import export_hf
from megatron_pbsd.checkpointing.manifest import (
    Contents,
    FileRecord,
    Manifest,
    checksum,
    file_problems,
    files_in,
    read_manifest,
    write_manifest,
)
from megatron_pbsd.resharding import checksum as published

RECOVERED = "recovered"
DRAFT = f"{RECOVERED}.new"
WEIGHTS = "model.safetensors"
TENSORS = "tensors.json"


def keep(
    checkpoints: Path, contents: Contents, tensors: Mapping[str, torch.Tensor], checksums: Mapping[str, str],
    origin: Path, further: Mapping[str, bytes] | None = None,
) -> Path:
    """Write `tensors`, the weights after `contents.step`, into `checkpoints`; all of them, or nothing.

    checksums: what they must have, once they are on disk; CheckpointError naming those that do not.
    origin:    folder whose configuration and tokenizer go with them.
    further:   files that are kept beside them, by name.
    """
    needed, free = sum(tensor.nbytes for tensor in tensors.values()), shutil.disk_usage(checkpoints).free
    if free < needed:
        raise CheckpointError(f"{checkpoints}: they need {needed} bytes, {free} are free")
    draft, final = checkpoints / DRAFT, checkpoints / RECOVERED
    try:
        export_hf(tensors, origin, draft)
        write_synced(draft / TENSORS, json.dumps(checksums, indent=1).encode())
        for name, content in (further or {}).items():
            write_synced(draft / name, content)
        if wrong := _differing(draft):
            raise CheckpointError(f"not what was published: {named(wrong)}")
        files = {}
        for path in files_in(draft):
            files[path.name] = FileRecord(path.stat().st_size, checksum(path))
            sync(path)
        write_manifest(draft, Manifest(contents, time.time(), files))
        sync(draft)
        shutil.rmtree(final, ignore_errors=True)
        draft.rename(final)
        sync(checkpoints)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{final} was not written: {error}") from error
    finally:
        for unfinished in checkpoints.glob(f"{DRAFT}*"):
            shutil.rmtree(unfinished, ignore_errors=True)
    return final


def problems(folder: Path) -> list[str]:
    """All that is wrong with recovered weights in `folder`, naming the file, and in it the tensors."""
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        return [str(error)]
    found = file_problems(folder, manifest)
    tensors = _differing(folder) if WEIGHTS in found and TENSORS not in found else []
    return [message + (f", in {named(tensors)}" if name == WEIGHTS and tensors else "")
            for name, message in found.items()]


def set_aside(checkpoints: Path) -> Path | None:
    """Keep them from being gone on from; where they are then, None when there are none."""
    folder = checkpoints / RECOVERED
    if not folder.is_dir():
        return None
    try:
        step = f"step_{read_manifest(folder).step}"
    except CheckpointError:
        step = "damaged"
    aside = checkpoints / f"{RECOVERED}_{step}"
    shutil.rmtree(aside, ignore_errors=True)
    return folder.rename(aside)


def drop(checkpoints: Path, step: int) -> None:
    """Remove those that a checkpoint of `step` has made superfluous."""
    folder = checkpoints / RECOVERED
    with suppress(CheckpointError):  # damaged, or none
        if read_manifest(folder).step <= step:
            shutil.rmtree(folder)


def _differing(folder: Path) -> list[str]:
    """Tensors in the folder that do not have their checksum, or cannot be read."""
    expected, wrong = json.loads((folder / TENSORS).read_text()), []
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            there = set(file.keys())
            for name, value in expected.items():
                if name not in there or published.checksum(file.get_tensor(name)) != value:
                    wrong.append(name)
    except (OSError, SafetensorError):
        return list(expected)
    return wrong

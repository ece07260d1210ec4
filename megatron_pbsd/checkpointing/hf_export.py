"""A policy as a Hugging Face folder that `transformers`, engines and learners load."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from megatron_pbsd.checkpointing.conversion.driver import convert
from megatron_pbsd.checkpointing.conversion.to_hf import ToHf
from megatron_pbsd.checkpointing.hf_folder import SINGLE, HfFile, carry


def export_checkpoint(learner: Path, origin: Path, folder: Path) -> None:
    """Write the model in the distributed checkpoint `learner`, which nobody changes meanwhile, with the configuration
    and tokenizer of `origin`; complete or not at all. What was in `folder` is replaced.

    CheckpointError naming the tensors that the checkpoint lacks, or has in part.
    """
    with _replacing(folder) as draft:
        convert(ToHf(learner, origin), draft, processes=1)


def export_hf(tensors: Mapping[str, torch.Tensor], origin: Path, folder: Path) -> None:
    """`export_checkpoint` of `tensors` (Hugging Face names)."""
    with _replacing(folder) as draft:
        draft.mkdir(parents=True)
        file = HfFile(draft / SINGLE, {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()})
        for tensor in tensors.values():
            file.write(tensor)
        file.close()
        carry(origin, draft)


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """A folder that does not exist yet, and takes the place of `folder` after the block."""
    draft = folder.with_name(folder.name + ".new")
    shutil.rmtree(draft, ignore_errors=True)
    yield draft
    shutil.rmtree(folder, ignore_errors=True)
    draft.rename(folder)

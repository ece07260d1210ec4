"""Failures of checkpoints."""

from __future__ import annotations

from collections.abc import Iterable

from megatron_pbsd.errors import PbsdError

NAMED = 4
"""Tensors that one message names."""


class CheckpointError(PbsdError):
    """A checkpoint could not be written, or is not what was written; the message names the file or the sizes."""

    component = "checkpoint"


def named(tensors: Iterable[str]) -> str:
    """`A, B and 7 others`, each once."""
    names = list(dict.fromkeys(tensors))
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} others" if len(names) > NAMED else "")

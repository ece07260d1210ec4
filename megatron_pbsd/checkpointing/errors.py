"""Failures of checkpoints."""

from __future__ import annotations

from megatron_pbsd.errors import PbsdError


class CheckpointError(PbsdError):
    """A checkpoint could not be written, or is not what was written; the message names the file or the sizes."""

    component = "checkpoint"

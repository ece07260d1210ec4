"""Failures to understand or divide a model."""

from __future__ import annotations

from megatron_pbsd.errors import PbsdError


class ModelError(PbsdError):
    """A model folder, or a layout for it, is not something this project can train; the message names the fields."""

    component = "model"

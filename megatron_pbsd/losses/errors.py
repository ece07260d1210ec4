"""Failures of losses."""

from __future__ import annotations

from megatron_pbsd.errors import PbsdError


class LossError(PbsdError):
    """A loss cannot be made, or was given or returned what it must not."""

    component = "loss"

from __future__ import annotations

from megatron_pbsd.errors import PbsdError


class RolloutError(PbsdError):
    """Trajectories cannot be collected as asked."""

    component = "rollout"

"""The policy that a configuration names."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from megatron_pbsd.config import RolloutConfig
from megatron_pbsd.rollout.length_context import LengthContext
from megatron_pbsd.rollout.length_history import LengthHistory
from megatron_pbsd.rollout.length_model import LengthModel
from megatron_pbsd.rollout.policies.context_aware import ContextAware
from megatron_pbsd.rollout.policies.divided import Divided
from megatron_pbsd.rollout.policies.group_pinned import GroupPinned
from megatron_pbsd.rollout.policies.least_loaded import LeastLoaded
from megatron_pbsd.rollout.policies.longest_remaining import LongestRemaining
from megatron_pbsd.rollout.scheduler import Policy


def configured_policy(config: RolloutConfig, tasks: Mapping[str, str], history: LengthHistory) -> Policy:
    """A policy for one rollout. tasks: group id → task id, under which `history` may know the group's prompt."""

    def prior(length: Callable[[str], int | None]) -> dict[str, int]:
        return {group: tokens for group, task in tasks.items() if (tokens := length(task)) is not None}

    chunk, limit = config.longest_chunk, config.most_generated
    match config.policy:
        case "group_pinned":
            return GroupPinned()
        case "least_loaded":
            return LeastLoaded()
        case "divided":
            return Divided(chunk)
        case "context_aware":
            return ContextAware(chunk, LengthContext(limit, prior(history.longest)))
        case "longest_remaining":
            return LongestRemaining(chunk, LengthModel(limit, prior(history.typical), history.share))

"""What the trajectories of a step look like, as metrics."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_pbsd.rollout.coordinator import CollectStatistics
from megatron_pbsd.trajectory import Group, trajectories_of


def of_engines(rollouts: Sequence[CollectStatistics]) -> dict[str, float]:
    """The work of a step's rollouts, one after the other."""
    seconds = sum(r.wall_seconds for r in rollouts)
    tokens = sum(r.generated_tokens for r in rollouts)
    return {
        "rollout/tokens": float(tokens),
        "rollout/tokens_per_s": (tokens - sum(r.taken_up_tokens for r in rollouts)) / seconds,
        "rollout/engine_idle": sum(r.engine_idle_share * r.wall_seconds for r in rollouts) / seconds,
        "rollout/cached_tokens": float(sum(r.cached_tokens for r in rollouts)),
        "rollout/attempts": float(len(rollouts)),
        "rollout/taken_up": float(sum(r.taken_up for r in rollouts)),
    }


def of_rollout(groups: Sequence[Group]) -> dict[str, float]:
    """Rewards, outcome measures and shapes of scored groups."""
    trajectories = trajectories_of(groups)
    rewards = [[t.reward for t in group.trajectories] for group in groups]
    kinds = [turn.kind for t in trajectories for turn in t.turns]
    metrics = {
        "reward/mean": np.mean([r for group in rewards for r in group]),
        "reward/informative_groups": np.mean([np.ptp(group) > 0 for group in rewards]),
        "rollout/turns": np.mean([len(t.turns) for t in trajectories]),
        "rollout/length_mean": np.mean([t.generated for t in trajectories]),
        "rollout/length_max": np.max([t.generated for t in trajectories]),
        "rollout/answered": np.mean([t.complete for t in trajectories]),
        "rollout/malformed_turns": np.mean([kind == "malformed" for kind in kinds]),
    }
    return {key: float(value) for key, value in metrics.items()}


def of_updates(updates: Sequence[dict[str, float]]) -> dict[str, float]:
    """A step's optimizer steps as one: means, but sums of token counts and maxima of maxima."""
    reduce = {"tokens": np.sum, "loss/ratio_max": np.max, "loss/mismatch_max_abs": np.max}
    return {key: float(reduce.get(key, np.mean)([update[key] for update in updates])) for key in updates[0]}


def of_evaluation(groups: Sequence[Group]) -> dict[str, float]:
    """Mean of every outcome measure over all trajectories."""
    trajectories = trajectories_of(groups)
    return {
        f"eval/{name}": float(np.mean([t.scores[name] for t in trajectories])) for name in trajectories[0].scores
    } | {"eval/turns": float(np.mean([len(t.turns) for t in trajectories]))}

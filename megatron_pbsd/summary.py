"""What the trajectories of a step look like, as metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
        "rollout/tail_s": sum(r.tail_seconds for r in rollouts),
        "rollout/moves": float(sum(r.moves for r in rollouts)),
        "rollout/engine_deaths": float(sum(len(r.deaths) for r in rollouts)),
        **_of_drafts(rollouts),
        **_of_kv(rollouts),
        **_of_lengths([r.predicted_lengths for r in rollouts if r.predicted_lengths]),
    }


def _of_drafts(rollouts: Sequence[CollectStatistics]) -> dict[str, float]:
    """acceptance_length: tokens per pass that verified a draft, the one after it included; 1 if there were none."""
    drafts, accepted = sum(r.drafts for r in rollouts), sum(r.accepted_tokens for r in rollouts)
    return {
        "speculation/acceptance_length": 1.0 + (accepted / drafts if drafts else 0.0),
        "speculation/drafted_tokens": float(sum(r.drafted_tokens for r in rollouts)),
        "speculation/accepted_tokens": float(accepted),
    }


def _of_kv(rollouts: Sequence[CollectStatistics]) -> dict[str, float]:
    """Tokens of contexts by where their KV came from: see `engines.protocol.KVCounters`."""
    kv = [r.kv for r in rollouts]
    return {
        "kv/slot_tokens": float(sum(c.slot_tokens for c in kv)),
        "kv/sibling_tokens": float(sum(c.sibling_tokens for c in kv)),
        "kv/restored_tokens": float(sum(c.restored_tokens for c in kv)),
        "kv/moved_tokens": float(sum(c.moved_in_tokens for c in kv)),
        "kv/moves_in": float(sum(c.moved_in for c in kv)),
        "kv/moves_out": float(sum(c.moved_out for c in kv)),
        "kv/recomputed_tokens": float(sum(r.recomputed_tokens for r in rollouts)),
        "kv/prefilled_tokens": float(sum(r.prefilled_tokens for r in rollouts)),
        "kv/parks": float(sum(c.parks for c in kv)),
        "kv/parked_tokens": float(sum(c.parked_tokens for c in kv)),
        "kv/dropped_tokens": float(sum(c.dropped_tokens for c in kv)),
        "kv/pool_bytes": float(kv[-1].bytes),
    }


def _of_lengths(calibrations: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Predicted against real lengths, of policies that predict: see `length_context.Calibration`."""
    return {f"lengths/{key}": float(np.mean([c[key] for c in calibrations])) for key in calibrations[0]} \
        if calibrations else {}


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

"""How far behind the weights that train it what a step trains on is, and what asking for more than that has cost."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_pbsd.config import RolloutConfig
from megatron_pbsd.prompts import Stream
from megatron_pbsd.rollout.errors import RolloutError
from megatron_pbsd.rollout.quota import due
from megatron_pbsd.rollout.request import Member, Started, Unfinished, oldest, spans_of
from megatron_pbsd.rollout.survival import Seen, kaplan_meier
from megatron_pbsd.trajectory import Group, Trajectory, trajectories_of


def staleness(trajectory: Trajectory, version: int) -> int:
    """Weight versions from the one that generated its oldest token to `version`; negative if that is older."""
    found = oldest(trajectory)
    return 0 if found is None else version - found


def check(groups: Sequence[Group], version: int, max_staleness: int) -> None:
    """RolloutError naming every trajectory that weights `version` may not train on: it has tokens of weights that are
    older than `max_staleness` allows, or newer than `version`."""
    wrong = [f"{t.trajectory_id} has tokens of versions {_versions(t)}" for t in trajectories_of(groups)
             if any(not 0 <= version - span.version <= max_staleness for span in spans_of(t))]
    if wrong:
        raise RolloutError(
            f"weights version {version} may train on tokens of versions {max(0, version - max_staleness)} to {version} "
            f"(rollout.max_staleness = {max_staleness}), but " + "; ".join(wrong[:5])
            + (f"; and {len(wrong) - 5} others" if len(wrong) > 5 else ""))


def _versions(trajectory: Trajectory) -> list[int]:
    return sorted({span.version for span in spans_of(trajectory)})


def metrics(config: RolloutConfig, stream: Stream, asked: int, groups: Sequence[Group], left: Sequence[Started],
            version: int) -> dict[str, float]:
    """Of a step that over-samples.

    stream:  where it began. asked: new groups. groups: that it trains on. left: that were not complete in time.
    """
    trajectories = trajectories_of(groups)
    behind = [staleness(t, version) for t in trajectories]
    spans = [span for t in trajectories for span in spans_of(t)]
    tokens = sum(span.end - span.start for span in spans)
    stale = sum(span.end - span.start for span in spans if span.version < version)
    dropped = [] if config.max_staleness else left
    return {
        "partial/asked_groups": float(asked),
        "partial/taken_groups": float(len(stream.carried)),
        "partial/due_groups": float(len(due(stream.carried, version, config.max_staleness))),
        "partial/carried_groups": float(len(left) - len(dropped)),
        "partial/dropped_groups": float(len(dropped)),
        "partial/wasted_tokens": float(sum(group.generated for group in dropped)),
        "staleness/mean": float(np.mean(behind)),
        "staleness/max": float(np.max(behind)),
        "staleness/stale_tokens": stale / max(tokens, 1),
        **length_bias(trajectories, seen(stream.carried, groups, left), config.most_generated),
    }


def seen(carried: Sequence[Started], groups: Sequence[Group], left: Sequence[Started]) -> list[Seen]:
    """What a step saw of the lengths of all trajectories in flight: from where they were when it began."""
    starts = {m.trajectory_id: m.generated for group in carried for m in group.unfinished}
    over = {t.trajectory_id for group in carried for t in group.finished}
    members: list[Member] = [*trajectories_of(groups), *(m for group in left for m in group.members)]
    return [Seen(starts.get(m.trajectory_id, 0), m.generated, not isinstance(m, Unfinished))
            for m in members if m.trajectory_id not in over]


def length_bias(trained: Sequence[Trajectory], watched: Sequence[Seen], limit: int) -> dict[str, float]:
    """Mean length of what is trained on over the estimated mean length of what was asked for: 1 is none, less favours
    short trajectories. `low` and `high` are its bounds where the longest were not seen to end."""
    mean = float(np.mean([t.generated for t in trained]))
    shorter, longer = kaplan_meier(watched).mean(limit)
    if not shorter:
        return {}
    return {"length_bias/trained_mean": mean, "length_bias/asked_mean": shorter,
            "length_bias/low": mean / longer, "length_bias/high": mean / shorter}

"""Outcome advantages: one number per trajectory, relative to its own prompt group."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np


def group_relative(rewards: Sequence[float], group_ids: Sequence[str], normalise_std: bool) -> np.ndarray:
    """GRPO (arXiv 2402.03300, section 4.1.2): `A_i = r_i - mean(r of i's group)`, over the group's std if asked.

    The baseline is keyed by group id, so groups of unequal size are right. A group whose rewards are all equal gets 0.

    Returns float64 [N] for N trajectories.
    """
    rewards = np.asarray(rewards, np.float64)
    members: dict[str, list[int]] = defaultdict(list)
    for i, group_id in enumerate(group_ids):
        members[group_id].append(i)
    advantages = np.zeros(len(rewards))
    for indices in members.values():
        centred = rewards[indices] - rewards[indices].mean()
        spread = rewards[indices].std()
        if spread > 1e-9:
            advantages[indices] = centred / spread if normalise_std else centred
    return advantages

"""Baselines: what a reward is compared with. Groups are keyed by id, so that their sizes may differ."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np


def group_relative(rewards: Sequence[float], group_ids: Sequence[str], normalise_std: bool) -> np.ndarray:
    """GRPO (arXiv 2402.03300, section 4.1.2): `A_i = r_i - mean(r of i's group)`, over the group's std if asked.

    A group whose rewards are all equal gets 0, a group of one among them.

    Returns float64 [N] for N trajectories.
    """
    rewards = np.asarray(rewards, np.float64)
    advantages = np.zeros(len(rewards))
    for members in _groups(group_ids):
        centred = rewards[members] - rewards[members].mean()
        spread = rewards[members].std()
        if spread > 1e-9:
            advantages[members] = centred / spread if normalise_std else centred
    return advantages


def leave_one_out(rewards: Sequence[float], group_ids: Sequence[str]) -> np.ndarray:
    """RLOO (arXiv 2402.14740): `A_i = r_i - mean(r of the others of i's group)`.

    A group of one has no others: its advantage is not defined, and 0 here, so that it teaches nothing.

    Returns float64 [N] for N trajectories.
    """
    rewards = np.asarray(rewards, np.float64)
    advantages = np.zeros(len(rewards))
    for members in _groups(group_ids):
        others = len(members) - 1
        if others:
            advantages[members] = (rewards[members] - rewards[members].mean()) * (len(members) / others)
    return advantages


def batch_normalised(advantages: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Mean 0 and standard deviation 1 over all tokens of all trajectories; all 0 where they do not differ.

    Takes and returns float64 [n] per trajectory.
    """
    tokens = np.concatenate([*advantages, np.empty(0)])
    mean, spread = (tokens.mean(), tokens.std()) if len(tokens) else (0.0, 0.0)
    return [(a - mean) / spread if spread > 1e-9 else np.zeros(len(a)) for a in advantages]


def _groups(group_ids: Sequence[str]) -> Iterable[list[int]]:
    """Positions of each group's trajectories."""
    members: dict[str, list[int]] = defaultdict(list)
    for i, group_id in enumerate(group_ids):
        members[group_id].append(i)
    return members.values()

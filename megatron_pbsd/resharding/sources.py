"""Who sends what, where several ranks could: bytes are dealt so that ranks send equally much over each kind of link."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Numbers = np.ndarray
"""int64."""


def deal(
    candidates: Sequence[Numbers], links: Sequence[int], chosen_from: Numbers, units: Numbers, counts: Numbers,
    ranks: int,
) -> tuple[Numbers, Numbers, Numbers, Numbers]:
    """Row i is `counts[i]` transfers of `units[i]` bytes each, which any rank of `candidates[chosen_from[i]]` could
    send, over the kind of link `links[chosen_from[i]]`.

    Returns rows (row, rank, first, count): `rank` sends the transfers `first` … `first` + `count` - 1 of `row`. Of each
    set of candidates the transfers are laid end to end and cut where the ranks that have sent least are level; each
    cut is within half a transfer of that.
    """
    loads = np.zeros((max(links, default=0) + 1, ranks))
    order = np.argsort(chosen_from, kind="stable")
    bounds = np.searchsorted(chosen_from[order], np.arange(len(candidates) + 1))
    found = []
    # The ranks that a small set has to choose from are also in larger ones, which can make up for it.
    for number in sorted(range(len(candidates)), key=lambda i: len(candidates[i])):
        rows, held = order[bounds[number] : bounds[number + 1]], candidates[number]
        if not len(rows):
            continue
        load = loads[links[number]]
        ends = np.cumsum(units[rows] * counts[rows])
        starts = ends - units[rows] * counts[rows]
        cuts = np.cumsum(_shares(load[held], float(ends[-1])))[:-1]
        # Of the transfers of a row that end up left of a cut, the last one has its middle there.
        row, rank, first, count = _cut(starts, units[rows], counts[rows], cuts)
        np.add.at(load, held[rank], units[rows][row] * count)
        found.append(np.stack([rows[row], held[rank], first, count]))
    return tuple(np.concatenate(found, axis=1)) if found else (np.zeros(0, np.int64),) * 4


def _shares(load: Numbers, total: float) -> Numbers:
    """How much each gets of `total` so that all are level, or as level as they can be: those with most get nothing."""
    order = np.argsort(load, kind="stable")
    rising = load[order]
    number = np.arange(1, len(load) + 1)
    # With the k least loaded filled up: the level that they reach.
    levels = (np.cumsum(rising) + total) / number
    filled = np.flatnonzero(levels >= rising)[-1]
    return np.maximum(levels[filled] - load, 0)


def _cut(starts: Numbers, units: Numbers, counts: Numbers, cuts: Numbers) -> tuple[Numbers, Numbers, Numbers, Numbers]:
    """Rows laid end to end and cut at these places, ascending: (row, part, first, count), parts counted from 0."""
    # Transfers of all rows before each cut, by the middle of each transfer.
    row = np.clip(np.searchsorted(starts, cuts, "right") - 1, 0, len(starts) - 1)
    within = np.clip(np.round((cuts - starts[row]) / units[row]), 0, counts[row]).astype(np.int64)
    before = np.concatenate([[0], np.cumsum(counts)])
    edges = np.unique(np.concatenate([before, before[row] + within]))
    places = before[row] + within
    first, last = edges[:-1], edges[1:]
    held = np.searchsorted(before, first, "right") - 1
    part = np.searchsorted(places, first, "right")
    return held, part, first - before[held], last - first

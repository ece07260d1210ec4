"""Micro-batches of sequences laid end to end, for `balance.plan`. Pure numpy.

A sequence goes by its place in descending order of length; widths (positions) and costs are arrays in that order.

Micro-batches are cells of a table: ranks are rows, micro-batches of one index a column. A column is as high as its
costliest cell, and the heights add up to the synchronised makespan. Cells are filled longest sequence first, each into
the cell that is then deepest below, or least above, its column's height. Heights start at a level, a share of the mean
cost of a cell: no level is best for all distributions, so that several are tried.
"""

from __future__ import annotations

import numpy as np

from megatron_pbsd.learner.partition import Groups, dealt, differencing, largest_sum, levelled, longest_first, refine

LEVELS = np.arange(11) / 10
# Trying a level takes far longer where a sequence may go to any rank.
FEW_LEVELS = (0.0, 0.5, 0.8)


def end_to_end(
    widths: np.ndarray, costs: np.ndarray, ranks: int, budget: int, multiple: int, synchronised: bool
) -> list[Groups]:
    """Sequences by rank and micro-batch; see `balance.plan`."""
    best, height = _ranks_first(widths, costs, ranks, budget, multiple)
    if synchronised:
        other, lower = _columns_first(widths, costs, ranks, budget, multiple)
        best = other if lower < height else best
    return best


def first_fit(widths: np.ndarray, budget: int) -> Groups:
    """Each sequence, the longest first, to the first micro-batch that has room for it (first-fit decreasing)."""
    room = np.full(len(widths), budget)
    bins: Groups = []
    for i, width in enumerate(widths.tolist()):
        place = int(np.argmax(room[: len(bins) + 1] >= width))
        if place == len(bins):
            bins.append([])
        bins[place].append(i)
        room[place] -= width
    return bins


def _ranks_first(
    widths: np.ndarray, costs: np.ndarray, ranks: int, budget: int, multiple: int
) -> tuple[list[Groups], float]:
    """Least makespan, which depends on the ranks' sets alone; their micro-batches are aligned afterwards."""
    bins = first_fit(widths, budget)
    starts = [longest_first(costs, ranks), differencing(costs, ranks), differencing(widths, ranks),
              [[i for b in rank for i in bins[b]] for rank in dealt(bins, ranks)]]
    groups = refine(costs, min(starts, key=lambda start: largest_sum(costs, start)))
    members = np.full((ranks, max(map(len, groups))), -1)
    for rank, group in enumerate(groups):
        members[rank, : len(group)] = sorted(group)
    # Index -1 is a sequence of nothing.
    own_widths, own_costs = np.append(widths, 0)[members], np.append(costs, 0.0)[members]
    highest = float(own_costs.sum(axis=1).max())
    count = -(-int(own_widths.sum(axis=1).max()) // (budget * multiple)) * multiple
    while True:
        columns, heights = _fill_rows(own_widths, own_costs, budget, count, LEVELS * highest / count)
        best = int(np.argmin(heights))
        if np.isfinite(heights[best]):
            break
        count += multiple
    return [[row[(row >= 0) & (column == j)].tolist() for j in range(count)]
            for row, column in zip(members, columns[best], strict=True)], float(heights[best])


def _fill_rows(widths: np.ndarray, costs: np.ndarray, budget: int, count: int, levels: np.ndarray
               ) -> tuple[np.ndarray, np.ndarray]:
    """For each level the column of each sequence, int64 [levels, ranks, n], and the sum of heights, [levels], infinite
    when some sequence finds no room.

    widths, costs: [ranks, n], each rank's own sequences in descending order, then zeros. All ranks, at all levels,
    place their k-th sequence at the same time.
    """
    room = np.full((len(levels), len(widths), count), budget)
    load = np.zeros(room.shape)
    heights = np.repeat(levels[:, None, None], count, axis=2)
    columns = np.empty((len(levels), *widths.shape), np.int64)
    lost = np.zeros(len(levels), bool)
    each_level, each_rank = np.ogrid[: len(levels), : len(widths)]
    for k in range(widths.shape[1]):
        above = np.where(room >= widths[:, k, None], load - heights, np.inf)
        column = np.argmin(above, axis=2)
        place = each_level, each_rank, column
        lost |= np.isinf(above[place]).any(axis=1)
        columns[:, :, k] = column
        room[place] -= widths[:, k]
        load[place] += costs[:, k]
        np.maximum(heights, load.max(axis=1, keepdims=True), out=heights)
    return columns, np.where(lost, np.inf, load.max(axis=1).sum(axis=1))


def _columns_first(
    widths: np.ndarray, costs: np.ndarray, ranks: int, budget: int, multiple: int
) -> tuple[list[Groups], float]:
    """Least sum of heights; then cells change places within their columns to level the ranks."""
    count = -(-int(widths.sum()) // (ranks * budget * multiple)) * multiple
    while True:
        level = float(costs.sum()) / (ranks * count)
        tried = [_fill_anywhere(widths, costs, ranks, budget, count, share * level) for share in FEW_LEVELS]
        cells, loads = min(tried, key=lambda option: option[1].max(axis=1).sum())
        height = float(loads.max(axis=1).sum())
        if np.isfinite(height):
            break
        count += multiple
    taken = levelled(loads)
    return [[cells[j * ranks + taken[j, rank]] for j in range(count)] for rank in range(ranks)], height


def _fill_anywhere(widths: np.ndarray, costs: np.ndarray, ranks: int, budget: int, count: int, level: float
                   ) -> tuple[Groups, np.ndarray]:
    """Sequences by cell, column after column, and costs [columns, ranks], infinite when a sequence finds no room."""
    room = np.full(count * ranks, budget)
    load = np.zeros((count, ranks))
    above = np.full((count, ranks), -level)
    cells: Groups = [[] for _ in range(count * ranks)]
    for i, (width, cost) in enumerate(zip(widths.tolist(), costs.tolist(), strict=True)):
        cell = int(np.argmin(np.where(room >= width, above.ravel(), np.inf)))
        if room[cell] < width:
            return cells, np.full_like(load, np.inf)
        cells[cell].append(i)
        column, rank = divmod(cell, ranks)
        room[cell] -= width
        load[column, rank] += cost
        above[column, rank] += cost
        above[column] -= max(above[column, rank], 0.0)
    return cells, load

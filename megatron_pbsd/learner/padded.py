"""Micro-batches as rectangles whose rows are padded to the longest, for `balance.plan`. Pure numpy.

A sequence goes by its place in descending order of length; widths (positions) and costs are arrays in that order.
A rectangle is a list of sequences, the longest first, and costs as much as that one for each of its rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from megatron_pbsd.learner.partition import Groups, dealt, differencing, largest_sum, levelled, longest_first, refine

# A rectangle may cost so many times what it must if all are to cost alike: larger ones leave ranks with a very long
# sequence fewer micro-batches to fill.
CAPS = (*(1 + step / 6 for step in range(12)), math.inf)
# One more micro-batch has to lower the objective to this share.
WORTH_A_MICRO_BATCH = 0.99


class Option(NamedTuple):
    """objective: makespan or synchronised makespan. groups: rectangles by rank, in order of micro-batches."""

    objective: float
    rectangles: Groups
    groups: Groups
    count: int


def in_rectangles(
    widths: np.ndarray, costs: np.ndarray, ranks: int, budget: int, multiple: int, synchronised: bool
) -> list[Groups]:
    """Sequences by rank and micro-batch; see `balance.plan`.

    With more micro-batches rectangles are smaller, waste less and balance better, ever less so.
    """
    fewest = -(-len(cut(range(len(widths)), widths, costs, budget)) // ranks)
    count = -(-fewest // multiple) * multiple
    best = _neighbours(widths, costs, ranks, budget, count, synchronised)
    while True:
        count += multiple
        better = _neighbours(widths, costs, ranks, budget, count, synchronised)
        if better.objective >= WORTH_A_MICRO_BATCH * best.objective:
            break
        best = better
    if not synchronised:
        best = _least(best, _ranks_first(widths, costs, ranks, budget, multiple))
    return [[best.rectangles[i] for i in group] + [[] for _ in range(best.count - len(group))]
            for group in best.groups]


def cut(
    sequences: Sequence[int], widths: np.ndarray, costs: np.ndarray, budget: int, cap: float = math.inf
) -> Groups:
    """Neighbours in length form a rectangle within the budget and, unless it is a single row, of at most cost `cap`."""
    rectangles, start = [], 0
    while start < len(sequences):
        longest = sequences[start]
        rows = min(budget // int(widths[longest]), len(sequences) - start)
        if rows * costs[longest] > cap:
            rows = max(int(cap / costs[longest]), 1)
        rectangles.append(list(sequences[start : start + rows]))
        start += rows
    return rectangles


def _neighbours(
    widths: np.ndarray, costs: np.ndarray, ranks: int, budget: int, count: int, synchronised: bool
) -> Option:
    """The sorted batch is cut into rectangles, which go to any rank."""
    everything, most = range(len(widths)), ranks * count
    low, high = float(costs.sum()) / most, float(_values(cut(everything, widths, costs, budget), costs).max())
    while high > 1.001 * low:
        middle = math.sqrt(low * high)
        if len(cut(everything, widths, costs, budget, middle)) <= most:
            high = middle
        else:
            low = middle
    place = _by_column if synchronised else _by_rank
    best = _least(*(place(cut(everything, widths, costs, budget, cap * high), costs, ranks, count) for cap in CAPS))
    return best if synchronised else _improved(best, costs)


def _by_column(rectangles: Groups, costs: np.ndarray, ranks: int, count: int) -> Option:
    """Those of like cost get the same index: the least synchronised makespan for these rectangles."""
    values = _values(rectangles, costs)
    order = np.argsort(-values, kind="stable")
    columns = np.zeros(ranks * count)
    columns[: len(values)] = values[order]
    columns = columns.reshape(count, ranks)
    taken = levelled(columns) + ranks * np.arange(count)[:, None]
    groups = [order[own[own < len(order)]].tolist() for own in taken.T]
    return Option(float(columns.max(axis=1).sum()), rectangles, groups, count)


def _by_rank(rectangles: Groups, costs: np.ndarray, ranks: int, count: int) -> Option:
    """Ranks get alike in sum."""
    values = _values(rectangles, costs)
    return _least(*(Option(largest_sum(values, groups), rectangles, groups, count)
                    for groups in (longest_first(values, ranks, count), dealt(rectangles, ranks))))


def _ranks_first(widths: np.ndarray, costs: np.ndarray, ranks: int, budget: int, multiple: int) -> Option:
    """Ranks get equally many positions, and each cuts its own sequences into rectangles."""
    by_rank = [cut(group, widths, costs, budget) for group in differencing(widths, ranks)]
    count = -(-max(map(len, by_rank)) // multiple) * multiple
    ends = np.cumsum([len(own) for own in by_rank]).tolist()
    groups = [list(range(end - len(own), end)) for end, own in zip(ends, by_rank, strict=True)]
    rectangles = [rectangle for own in by_rank for rectangle in own]
    return _improved(Option(math.inf, rectangles, groups, count), costs)


def _improved(option: Option, costs: np.ndarray) -> Option:
    """Rectangles change ranks where that lowers the makespan, and then go by cost, so that like meets like."""
    values = _values(option.rectangles, costs)
    groups = [sorted(group, key=lambda i: -values[i]) for group in refine(values, option.groups, option.count)]
    return option._replace(objective=largest_sum(values, groups), groups=groups)


def _least(*options: Option) -> Option:
    return min(options, key=lambda option: option.objective)


def _values(rectangles: Groups, costs: np.ndarray) -> np.ndarray:
    return np.array([len(rectangle) * costs[rectangle[0]] for rectangle in rectangles])

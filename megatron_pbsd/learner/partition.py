"""Multiway number partitioning: values into groups whose sums are as equal as possible. Pure numpy.

Values are not negative; a group is a list of their indices.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Sequence

import numpy as np

Groups = list[list[int]]

# An exchange is looked for between the group with the largest sum and so many of those with the smallest.
PARTNERS = 8
# Sums within this share of their mean are equal for any purpose.
TOLERANCE = 1e-4


def largest_sum(values: np.ndarray, groups: Groups) -> float:
    """What partitioning makes as small as possible."""
    return max(float(values[group].sum()) for group in groups)


def longest_first(values: np.ndarray, parts: int, most: int | None = None) -> Groups:
    """Each value, the largest first, to the group with the smallest sum (LPT).

    The largest sum is at most 4/3 - 1/(3 parts) of the optimum (Graham 1969).

    most: a group has at most so many values, of which there may be `parts * most`.
    """
    groups: Groups = [[] for _ in range(parts)]
    heap = [(0.0, part) for part in range(parts)]
    for i in np.argsort(-values, kind="stable").tolist():
        total, part = heapq.heappop(heap)
        groups[part].append(i)
        if len(groups[part]) != most:
            heapq.heappush(heap, (total + float(values[i]), part))
    return groups


def dealt(values: Sequence[object], parts: int) -> Groups:
    """Each value in turn to the next group."""
    return [list(range(part, len(values), parts)) for part in range(parts)]


def levelled(columns: np.ndarray) -> np.ndarray:
    """Which value of each column a part takes, so that the parts' sums are alike and each takes one of every column.

    columns: [columns, parts]; int64 of the same shape is returned. The column that varies most comes first, its largest
    value goes to the part with the smallest sum.
    """
    taken = np.empty(columns.shape, dtype=np.int64)
    sums = np.zeros(columns.shape[1])
    for column in np.argsort(-np.ptp(columns, axis=1), kind="stable"):
        parts, values = np.argsort(sums, kind="stable"), np.argsort(-columns[column], kind="stable")
        taken[column, parts] = values
        sums[parts] += columns[column, values]
    return taken


def differencing(values: np.ndarray, parts: int) -> Groups:
    """Largest differencing method (Karmarkar and Karp 1982; for several parts Michiels, Korst and Aarts 2003).

    A state is a partition of some of the values, at first of each alone. The two whose sums differ most are united,
    the largest sum of one with the smallest of the other, until one is left. States leave out empty groups.
    """
    states = [(-value, i, [(value, [i])]) for i, value in enumerate(values.tolist())]
    heapq.heapify(states)
    for made in range(len(values), 2 * len(values) - 1):
        *_, one = heapq.heappop(states)
        *_, other = heapq.heappop(states)
        united = _united(*sorted((one, other), key=len), parts)
        smallest = united[0][0] if len(united) == parts else 0.0
        heapq.heappush(states, (smallest - united[-1][0], made, united))
    groups = [sorted(group) for *_, united in states for _, group in united]
    return groups + [[] for _ in range(parts - len(groups))]


def _united(fewer: list[tuple[float, list[int]]], more: list[tuple[float, list[int]]], parts: int
            ) -> list[tuple[float, list[int]]]:
    """Both states are in ascending order of their sums, and so is the result; `more` is changed."""
    if len(fewer) == 1:  # most unions are with a single value
        (value, group), = fewer
        total, least = more.pop(0) if len(more) == parts else (0.0, [])
        insort(more, (total + value, least + group))
        return more
    paired = max(len(fewer) + len(more) - parts, 0)
    joined = [(a + b, x + y) for (a, x), (b, y) in zip(more[:paired], reversed(fewer[:paired]), strict=True)]
    return sorted(joined + more[paired:] + fewer[paired:])


def refine(values: np.ndarray, groups: Groups, most: int | None = None) -> Groups:
    """Lower the largest sum by moving a value from its group to another, or exchanging two, while that helps.

    The largest sum never grows. The number of exchanges is bounded by a multiple of the number of groups.
    most: as for `longest_first`.
    """
    groups = [list(group) for group in groups]
    sums = np.array([values[group].sum() for group in groups])
    for _ in range(16 * len(groups)):
        top = int(np.argmax(sums))
        if sums[top] <= sums.mean() * (1 + TOLERANCE):
            break
        for partner in np.argsort(sums, kind="stable")[:PARTNERS].tolist():
            found = _exchange(values, groups[top], groups[partner], sums[top] - sums[partner],
                              may_move=len(groups[partner]) != most)
            if found:
                break
        else:
            break
        given, taken = found
        groups[top] = [i for i in groups[top] if i != given] + taken
        groups[partner] = [i for i in groups[partner] if i not in taken] + [given]
        for group in (top, partner):
            sums[group] = values[groups[group]].sum()
    return groups


def _exchange(values: np.ndarray, source: Sequence[int], target: Sequence[int], difference: float, may_move: bool
              ) -> tuple[int, list[int]] | None:
    """What `source` gives to `target` and takes back so that their sums, `difference` apart, come closest."""
    offered = np.append(values[target], 0.0) if may_move else values[target]
    shifts = values[source][:, None] - offered
    gain = np.minimum(shifts, difference - shifts)
    if not gain.size or gain.max() <= TOLERANCE * TOLERANCE * difference:
        return None
    given, taken = divmod(int(np.argmax(gain)), len(offered))
    return source[given], [target[taken]] if taken < len(target) else []

"""Which nodes measure when, and what the measurements say of nodes. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median_high

from launcher.preflight.facts import Pair

SLOW = 0.7
"""Share of the typical node's bandwidth below which a node is called slow. Measurements of equal nodes differ by some
10 %; a link that fell back a generation has half."""


def rounds(nodes: Sequence[int]) -> list[list[tuple[int, int]]]:
    """Every pair once, as few rounds as there can be, and nobody twice in one: the circle method of round-robin
    tournaments (E. Lucas, Récréations mathématiques II, 1883). Pairs are (smaller, larger)."""
    circle: list[int | None] = [*nodes, *([None] if len(nodes) % 2 else [])]
    size, found = len(circle), []
    for _ in range(size - 1):
        pairs = [(circle[i], circle[size - 1 - i]) for i in range(size // 2)]
        found.append([(min(a, b), max(a, b)) for a, b in pairs if a is not None and b is not None])
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return found


def speeds(pairs: Sequence[Pair]) -> dict[int, float]:
    """Rank → the median of its pairs' bandwidths, the higher of two: a node is not slow for its slow partners, unless
    they are more than half of all. What failed counts as 0."""
    by_rank: dict[int, list[float]] = {}
    for pair in pairs:
        for rank in (pair.first, pair.second):
            by_rank.setdefault(rank, []).append(pair.gb_s or 0.0)
    return {rank: median_high(found) for rank, found in by_rank.items()}


def slow_nodes(pairs: Sequence[Pair], fraction: float) -> dict[int, float]:
    """Rank → speed of those under `fraction` of the typical node's. Of two nodes it cannot be said which one is."""
    found = speeds(pairs)
    if len(found) < 3:
        return {}
    typical = median_high(found.values())
    return {rank: speed for rank, speed in found.items() if speed < fraction * typical}


def slow_pairs(pairs: Sequence[Pair], fraction: float) -> list[tuple[Pair, float]]:
    """Pairs under `fraction` of what both of their nodes do with others, and that: it is what lies between the two.
    None of them has a slow node."""
    found: Mapping[int, float] = speeds(pairs)
    if len(found) < 3:
        return []
    slow = slow_nodes(pairs, fraction)
    expected = [(pair, min(found[pair.first], found[pair.second])) for pair in pairs
                if pair.first not in slow and pair.second not in slow]
    return [(pair, usual) for pair, usual in expected if pair.gb_s is not None and pair.gb_s < fraction * usual]


def suspects(pairs: Sequence[Pair]) -> set[int]:
    """Nodes that would be called slow, or are of a slow pair, and have answered: to be measured once more before."""
    slow = {rank for rank, speed in slow_nodes(pairs, SLOW).items() if speed}
    return slow | {rank for pair, _ in slow_pairs(pairs, SLOW) for rank in (pair.first, pair.second)}


def better(pairs: Sequence[Pair]) -> list[Pair]:
    """Of several measurements of a pair the fastest: others' traffic makes them slower, nothing makes them faster."""
    best: dict[tuple[int, int], Pair] = {}
    for pair in pairs:
        known = best.setdefault((pair.first, pair.second), pair)
        if (pair.gb_s or 0.0) > (known.gb_s or 0.0):
            best[pair.first, pair.second] = pair
    return list(best.values())

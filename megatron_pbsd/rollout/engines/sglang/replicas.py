"""Which of a server's replicas of attention runs a chunk: pure."""

from __future__ import annotations

from collections.abc import Sequence


def replica_for(running: Sequence[int], slots: int, home: int | None) -> int:
    """The chunk's home, unless it would wait for a slot there and not elsewhere; else where the fewest run.

    running: chunks of each replica, those included that wait there. slots: of each. home: the replica that has the
    chunk's KV, if one has.
    """
    if home is not None and (running[home] < slots or min(running) >= slots):
        return home
    return min(range(len(running)), key=running.__getitem__)

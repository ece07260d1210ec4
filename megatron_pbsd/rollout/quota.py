"""When a rollout that asks for more than it needs may end, and which groups it has then made: pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from megatron_pbsd.rollout.request import Started


def due(carried: Sequence[Started], version: int, max_staleness: int) -> frozenset[str]:
    """Ids of the groups that have to be trained on by weights `version`: by the next ones their oldest tokens would be
    more than `max_staleness` versions behind."""
    return frozenset(group.group_id for group in carried
                     if group.oldest is not None and version - group.oldest >= max_staleness)


class Quota:
    """Counts the trajectories that are missing.

    missing:  group → unfinished members, in the order in which the groups were asked for.
    wanted:   groups that have to be complete; None: all.
    due:      groups that have to be among them.
    """

    def __init__(self, missing: Mapping[str, int], wanted: int | None = None, due: Collection[str] = ()):
        self._missing = dict(missing)
        self._wanted = len(missing) if wanted is None else min(wanted, len(missing))
        self._due = frozenset(due)
        self._complete = sum(not count for count in self._missing.values())
        self._due_left = sum(self._missing[group] > 0 for group in self._due)

    def finished(self, group_id: str) -> None:
        """One of its trajectories."""
        self._missing[group_id] -= 1
        if not self._missing[group_id]:
            self._complete += 1
            self._due_left -= group_id in self._due

    @property
    def reached(self) -> bool:
        return self._complete >= self._wanted and not self._due_left

    @property
    def chosen(self) -> frozenset[str]:
        """Complete groups: all that are due, and of the others, those that were asked for first, as many as are wanted.
        More than wanted only if more are due."""
        complete = [group for group, missing in self._missing.items() if not missing]
        others = [group for group in complete if group not in self._due]
        room = max(0, self._wanted - (len(complete) - len(others)))
        return self._due.intersection(complete).union(others[:room])

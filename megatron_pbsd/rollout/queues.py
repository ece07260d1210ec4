"""Orders in which requests wait: heaps with lazy deletion, O(log n) per entry.

Of the entries of a request in a queue only the latest counts (`Request.entry`), and that only while it waits, so that
starting a request costs nothing here.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from typing import Any

from megatron_pbsd.rollout.scheduler import Request

Key = Callable[[Request], Any]

TURN_EVERY = 256
"""Every so many placements one goes to whoever has waited longest."""


class RequestQueue:
    """By a key, smallest first; equal ones by order of arrival. A request whose key has changed while it waits has to
    be pushed again."""

    def __init__(self, key: Key):
        self._key = key
        self._pushed = 0
        self._heap: list[tuple[Any, int, int, Request]] = []

    def push(self, request: Request) -> None:
        self._pushed += 1
        request.entry = self._pushed
        heapq.heappush(self._heap, (self._key(request), request.order, self._pushed, request))

    def head(self) -> Request | None:
        heap = self._heap
        while heap:
            _, _, entry, request = heap[0]
            if request.waiting and request.entry == entry:
                return request
            heapq.heappop(heap)
        return None


class GroupQueue:
    """By a key of the request's group first, which may change at any time, then by a key of its own.

    `rekeyed` has to be called after a group's key has changed.
    """

    def __init__(self, group_key: Callable[[str], Any], key: Key):
        self._group_key, self._key = group_key, key
        self._members: dict[str, RequestQueue] = {}
        self._numbers: dict[str, int] = {}
        self._entries: dict[str, int] = {}
        self._heap: list[tuple[Any, int, int, str]] = []

    def push(self, request: Request) -> None:
        group = request.group_id
        members = self._members.get(group)
        if members is None:
            members = self._members[group] = RequestQueue(self._key)
            self._numbers[group] = len(self._numbers)
            self._entries[group] = 0
        members.push(request)
        if not self._entries[group] % 2:
            self._enter(group)

    def _enter(self, group: str) -> None:
        # An odd number marks the group's one valid entry in the heap, an even one that it has none.
        self._entries[group] += 1 if self._entries[group] % 2 == 0 else 2
        heapq.heappush(self._heap, (self._group_key(group), self._numbers[group], self._entries[group], group))

    def rekeyed(self, group: str) -> None:
        if self._entries.get(group, 0) % 2:
            self._enter(group)

    def head(self) -> Request | None:
        heap = self._heap
        while heap:
            _, _, entry, group = heap[0]
            if entry == self._entries[group]:
                if (request := self._members[group].head()) is not None:
                    return request
                self._entries[group] += 1
            heapq.heappop(heap)
        return None


class Turns:
    """The safeguard against starvation: every `every`-th placement goes to whoever has waited longest.

    A request before which n others have begun to wait is therefore placed within `every` · (n + 1) placements, and at
    most 1 / `every` of the placements differ from what the policy wanted.
    """

    def __init__(self, every: int = TURN_EVERY):
        self._every = every
        self._since = 0
        self._most = 1024
        self._oldest: deque[tuple[int, Request]] = deque()

    def push(self, request: Request) -> None:
        self._oldest.append((request.ticket, request))
        if len(self._oldest) > self._most:
            self._oldest = deque((t, r) for t, r in self._oldest if r.waiting and r.ticket == t)
            self._most = 1024 + 2 * len(self._oldest)

    def placed(self) -> None:
        self._since += 1

    def due(self) -> Request | None:
        """The request whose turn it is regardless of the policy's order, if it is anybody's."""
        if self._since % self._every != self._every - 1:
            return None
        oldest = self._oldest
        while oldest:
            ticket, request = oldest[0]
            if request.waiting and request.ticket == ticket:
                return request
            oldest.popleft()
        return None

"""Which engine works on which chunk: a pure state machine. No clock, no I/O.

Events in: `submit`, `finish`, `lose`. Decisions out: `dispatch`. What orders waiting requests and picks engines is a
policy object.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from typing import Protocol


class Policy(Protocol):
    def choose(self, request_id: str, home: str | None, in_flight: Mapping[str, int], slots: int) -> str | None:
        """The engine for a waiting request, or None to let it wait.

        home: the engine that holds the request's KV, if any. in_flight: chunks per engine.
        """


class LeastLoaded:
    """The engine with the request's KV unless it is busier than the least loaded by more than `spread`."""

    def __init__(self, spread: int = 32):
        self.spread = spread

    def choose(self, request_id: str, home: str | None, in_flight: Mapping[str, int], slots: int) -> str | None:
        least = min(in_flight, key=in_flight.__getitem__)
        if home in in_flight and in_flight[home] < slots and in_flight[home] - in_flight[least] <= self.spread:
            return home
        return least if in_flight[least] < slots else None


class Scheduler:
    """First come, first served, onto the engines that the policy picks."""

    def __init__(self, engines: Sequence[str], slots: int, policy: Policy):
        self._slots, self._policy = slots, policy
        self._running: dict[str, set[str]] = {engine: set() for engine in engines}
        self._waiting: OrderedDict[str, None] = OrderedDict()
        self._home: dict[str, str] = {}

    @property
    def idle(self) -> bool:
        return not self._waiting and not any(self._running.values())

    def running(self, engine: str) -> int:
        return len(self._running[engine])

    def submit(self, request_id: str) -> None:
        """The request's next chunk is ready to run."""
        if request_id in self._waiting or any(request_id in running for running in self._running.values()):
            raise ValueError(f"request {request_id!r} is already waiting or running")
        self._waiting[request_id] = None

    def finish(self, request_id: str, engine: str) -> None:
        """A chunk came back; the request's KV stays where it ran."""
        self._running[engine].remove(request_id)
        self._home[request_id] = engine

    def forget(self, request_id: str) -> str | None:
        """The request is over. Returns the engine that holds its KV."""
        return self._home.pop(request_id, None)

    def dispatch(self, available: Collection[str]) -> dict[str, list[str]]:
        """Start what can start on the `available` engines: engine -> requests."""
        starting: dict[str, list[str]] = {engine: [] for engine in self._running if engine in available}
        for request_id in list(self._waiting) if starting else ():
            in_flight = {engine: len(self._running[engine]) for engine in starting}
            engine = self._policy.choose(request_id, self._home.get(request_id), in_flight, self._slots)
            if engine is None:
                break
            del self._waiting[request_id]
            self._running[engine].add(request_id)
            starting[engine].append(request_id)
        return {engine: requests for engine, requests in starting.items() if requests}

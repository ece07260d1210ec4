"""Which waiting chunk runs on which engine: a pure state machine. Events in, assignments out.

It has no clock and does no I/O; whoever drives it, a live coordinator or a simulation, gets the same decisions from the
same events.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol


class SchedulerError(ValueError):
    """An event does not fit the state; the message names the request or the engine."""


@dataclass(frozen=True)
class Waiting:
    """A chunk to be placed. `holder`: the engine that ran the request's last chunk and may hold its KV."""

    request_id: str
    group_id: str
    context_tokens: int
    holder: str | None


@dataclass
class EngineLoad:
    name: str
    slots: int
    in_flight: int = 0

    @property
    def free(self) -> int:
        return self.slots - self.in_flight


@dataclass(frozen=True)
class Assignment:
    """`leaves`: the engine that held the request's KV, when it moves to another one."""

    request_id: str
    engine: str
    leaves: str | None = None


class Policy(Protocol):
    def choose(self, waiting: Mapping[str, Waiting], engines: Mapping[str, EngineLoad]) -> tuple[str, str] | None:
        """The next (request id, engine name), or None to leave all that wait waiting.

        Called again after each assignment. `waiting` is in order of arrival; the engine must have a free slot.
        """


class Scheduler:
    """A request is waiting, in flight on one engine, or between chunks; `request_finished` forgets it."""

    def __init__(self, policy: Policy):
        self._policy = policy
        self._engines: dict[str, EngineLoad] = {}
        self._waiting: dict[str, Waiting] = {}
        self._in_flight: dict[str, tuple[Waiting, str]] = {}
        self._holders: dict[str, str] = {}

    @property
    def waiting(self) -> Iterable[str]:
        return self._waiting.keys()

    def in_flight(self, engine: str) -> list[str]:
        return [request_id for request_id, (_, at) in self._in_flight.items() if at == engine]

    def engine_joined(self, name: str, slots: int) -> None:
        if name in self._engines:
            raise SchedulerError(f"engine {name!r} has already joined")
        self._engines[name] = EngineLoad(name, slots)

    def engine_lost(self, name: str) -> list[str]:
        """Its chunks wait again, before all others. Returns their request ids."""
        if name not in self._engines:
            raise SchedulerError(f"engine {name!r} is lost but never joined; known are {sorted(self._engines)}")
        del self._engines[name]
        self._holders = {request: holder for request, holder in self._holders.items() if holder != name}
        lost = self.in_flight(name)
        again = {r: self._in_flight.pop(r)[0] for r in lost}
        self._waiting = {
            w.request_id: Waiting(w.request_id, w.group_id, w.context_tokens, self._holders.get(w.request_id))
            for w in (*again.values(), *self._waiting.values())}
        return lost

    def submitted(self, request_id: str, group_id: str, context_tokens: int) -> None:
        """A chunk of the request is to be run."""
        if request_id in self._waiting or request_id in self._in_flight:
            raise SchedulerError(f"request {request_id!r} has a chunk that is not finished")
        self._waiting[request_id] = Waiting(request_id, group_id, context_tokens, self._holders.get(request_id))

    def chunk_finished(self, request_id: str) -> None:
        if request_id not in self._in_flight:
            raise SchedulerError(f"request {request_id!r} finished a chunk but is not in flight")
        _, engine = self._in_flight.pop(request_id)
        self._engines[engine].in_flight -= 1
        self._holders[request_id] = engine

    def request_finished(self, request_id: str) -> str | None:
        """Forget a request between chunks. Returns the engine that holds its KV."""
        if request_id in self._waiting or request_id in self._in_flight:
            raise SchedulerError(f"request {request_id!r} is over but has a chunk that is not finished")
        return self._holders.pop(request_id, None)

    def decisions(self) -> list[Assignment]:
        """Place waiting chunks until the policy has nothing to place. The chunks are in flight from now on."""
        made = []
        while self._waiting and (choice := self._policy.choose(self._waiting, self._engines)) is not None:
            request_id, engine = choice
            load = self._engines[engine]
            if load.free <= 0:
                raise SchedulerError(f"the policy chose engine {engine!r}, whose {load.slots} slots are all in use")
            chunk = self._waiting.pop(request_id)
            load.in_flight += 1
            self._in_flight[request_id] = (chunk, engine)
            moves = chunk.holder is not None and chunk.holder != engine
            made.append(Assignment(request_id, engine, leaves=chunk.holder if moves else None))
        return made

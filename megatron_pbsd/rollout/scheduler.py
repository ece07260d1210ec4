"""Which waiting chunk runs on which engine: a pure state machine. Events in, assignments out.

It has no clock and does no I/O; whoever drives it, a live coordinator or a simulation, gets the same decisions from the
same events. The order of waiting and the choice of engine are a policy's; one event or decision costs O(log n).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from megatron_pbsd.rollout.engine_index import EngineIndex, EngineLoad

PULL_TOKENS = 512
"""An engine that lacks more KV than this of a request's context gets it moved; less it computes again (Seer)."""


class SchedulerError(ValueError):
    """An event does not fit the state; the message names the request or the engine."""


@dataclass(eq=False, slots=True)
class Request:
    """A trajectory as the scheduler knows it: waiting, in flight on `engine`, or between two chunks.

    order:           of its first submission.
    context_tokens:  tokens whose KV its next chunk needs.
    room:            most tokens that may still be generated before it ends or another turn begins; None: unknown.
    generated:       tokens generated so far, in all turns.
    holder:          the engine that ran its last chunk and may hold its KV.
    ticket:          number of its present or latest wait.
    entry:           number of its latest entry in a queue.
    place:           among its group, for policies that ask.
    """

    request_id: str
    group_id: str
    order: int
    context_tokens: int = 0
    room: int | None = None
    generated: int = 0
    ticket: int = 0
    entry: int = 0
    place: int = 0
    waiting: bool = False
    engine: EngineLoad | None = None
    holder: EngineLoad | None = None
    reserved: int = 0

    @property
    def begun(self) -> bool:
        return self.holder is not None or self.generated > 0


class Assignment(NamedTuple):
    """leaves: the engine that held the request's KV, when it moves to another one. max_tokens: of the chunk; None: to
    the end of the turn. pull_tokens: tokens of KV to be moved from `leaves`, or the pool it shares; what is missing
    otherwise is computed again."""

    request_id: str
    engine: str
    leaves: str | None = None
    max_tokens: int | None = None
    pull_tokens: int = 0


class Policy(Protocol):
    """Keeps the requests that wait in its order. It belongs to one scheduler.

    admits:        chunks wait here until an engine has a slot and KV for all they may come to need; otherwise engines
        get everything at once, and queue and preempt on their own.
    chunk_tokens:  longest chunk; None does not divide. Only chunks bound how much KV a request may come to need: whole
        requests are admitted by what they need at once, and engines preempt them when that turns out to be too little.
    """

    admits: bool
    chunk_tokens: int | None

    def wait(self, request: Request) -> None:
        """It waits from now on, until its `waiting` is false."""

    def head(self) -> Request | None:
        """The request to be placed next."""

    def place(self, request: Request, tokens: int, engines: EngineIndex) -> EngineLoad | None:
        """An engine that fits `tokens` more of KV, or None to let `request`, and all behind it, wait."""

    def started(self, request: Request) -> None:
        """Its chunk has been placed."""

    def finished(self, request: Request) -> None:
        """It is over; `request.generated` is its length."""


class Scheduler:
    """pull_above: an engine that lacks the KV of more tokens than this gets it moved."""

    def __init__(self, policy: Policy, pull_above: int = PULL_TOKENS):
        self._policy, self._pull_above = policy, pull_above
        self._engines = EngineIndex()
        self._leaving: dict[str, EngineLoad] = {}
        self._requests: dict[str, Request] = {}
        self._submitted = 0

    @property
    def waiting(self) -> Iterable[str]:
        return [request.request_id for request in self._requests.values() if request.waiting]

    def in_flight(self, engine: str) -> list[str]:
        known = self._engines.get(engine) or self._leaving.get(engine)
        return [] if known is None else list(known.running)

    def engine_joined(self, name: str, slots: int, kv_tokens: int | None = None) -> None:
        """kv_tokens: how many tokens' KV it has memory for, if that is to be kept within bounds here."""
        if self._engines.get(name) is not None or self.in_flight(name):
            raise SchedulerError(f"engine {name!r} has already joined")
        self._leaving.pop(name, None)
        admits = self._policy.admits
        self._engines.join(name, slots if admits else math.inf, kv_tokens if admits else None)

    def engine_lost(self, name: str) -> list[str]:
        """Its chunks wait again, from where they began. Returns their request ids."""
        gone = self._leaving.pop(name, None) or self._engines.lose(self._known(name))
        lost = list(gone.running.values())
        for request in lost:
            request.engine = None
            self._wait(request)
        return [request.request_id for request in lost]

    def engine_leaving(self, name: str) -> None:
        """It gets no more chunks; those in flight on it end, and their requests go on elsewhere."""
        self._leaving[name] = self._engines.lose(self._known(name))

    def _known(self, name: str) -> str:
        if self._engines.get(name) is None:
            known = sorted(engine.name for engine in self._engines)
            raise SchedulerError(f"engine {name!r} is lost but never joined; known are {known}")
        return name

    def submitted(self, request_id: str, group_id: str, context_tokens: int, room: int | None = None) -> None:
        """A chunk of the request is to be run: its first, or its next."""
        request = self._requests.get(request_id)
        if request is None:
            request = self._requests[request_id] = Request(request_id, group_id, self._submitted)
            self._submitted += 1
        elif request.waiting or request.engine is not None:
            raise SchedulerError(f"request {request_id!r} has a chunk that is not finished")
        request.context_tokens, request.room = context_tokens, room
        self._wait(request)

    def _wait(self, request: Request) -> None:
        if request.holder is not None and not request.holder.alive:
            request.holder = None
        request.waiting = True
        request.ticket += 1
        self._policy.wait(request)

    def chunk_finished(self, request_id: str, generated: int = 0) -> None:
        """`generated`: tokens of the chunk. Until it is submitted again, the request holds no slot."""
        request = self._requests.get(request_id)
        if request is None or request.engine is None:
            raise SchedulerError(f"request {request_id!r} finished a chunk but is not in flight")
        engine = request.engine
        self._engines.ended(engine, request, request.reserved)
        request.generated += generated
        request.engine, request.holder = None, engine

    def request_finished(self, request_id: str) -> str | None:
        """Forget a request between chunks. Returns the engine that holds its KV."""
        request = self._requests.get(request_id)
        if request is None:
            return None
        if request.waiting or request.engine is not None:
            raise SchedulerError(f"request {request_id!r} is over but has a chunk that is not finished")
        del self._requests[request_id]
        self._policy.finished(request)
        return request.holder.name if request.holder is not None and request.holder.alive else None

    def decisions(self) -> list[Assignment]:
        """Place waiting chunks until the policy has nothing to place. The chunks are in flight from now on."""
        policy, engines, made = self._policy, self._engines, []
        while engines.least() is not None and (request := policy.head()) is not None:
            chunk = policy.chunk_tokens
            if chunk is not None and request.room is not None:
                chunk = min(chunk, request.room)
            tokens = request.context_tokens + (chunk or 0)
            engine = policy.place(request, tokens, engines)
            if engine is None:
                break
            if not engine.fits(tokens):
                raise SchedulerError(f"the policy chose engine {engine.name!r} for {tokens} tokens of KV; it has "
                                     f"{engine.in_flight} of {engine.slots} slots and {engine.reserved} of "
                                     f"{engine.kv_tokens} tokens in use")
            request.waiting, request.engine, request.reserved = False, engine, tokens
            engines.started(engine, request, tokens)
            policy.started(request)
            made.append(assignment(request, engine, chunk, self._pull_above))
        return made


def assignment(request: Request, engine: EngineLoad, chunk: int | None, pull_above: int) -> Assignment:
    holder = request.holder
    if holder is None or holder is engine or not holder.alive:
        return Assignment(request.request_id, engine.name, None, chunk)
    pull = request.context_tokens if request.context_tokens > pull_above else 0
    return Assignment(request.request_id, engine.name, holder.name, chunk, pull)

"""Largest likely remaining length first: what is known of a group and how far a request has come, together."""

from __future__ import annotations

from megatron_pbsd.rollout.engine_index import EngineIndex, EngineLoad
from megatron_pbsd.rollout.length_context import LengthContext
from megatron_pbsd.rollout.queues import RequestQueue, Turns
from megatron_pbsd.rollout.routing import SPREAD, balanced
from megatron_pbsd.rollout.scheduler import Request

TURN_EVERY = 64


class LongestRemaining:
    admits = True

    def __init__(self, chunk_tokens: int, lengths: LengthContext, spread: int = SPREAD, turn_every: int = TURN_EVERY):
        self.chunk_tokens: int | None = chunk_tokens
        self.lengths, self._spread = lengths, spread
        self._members: dict[str, dict[str, Request]] = {}
        self._queue = RequestQueue(self._key)
        self._turns = Turns(turn_every)

    def _key(self, request: Request) -> tuple[float, int]:
        group = self._members[request.group_id]
        first = next(iter(group))
        known = self.lengths.known(request.group_id)
        if first == request.request_id and not known:
            return (-1e18, request.generated)
        return (-self.lengths.remaining(request.group_id, request.generated), self._rank[request.request_id])

    _rank: dict

    def wait(self, request: Request) -> None:
        if not hasattr(self, "_r"):
            self._r = 1; self._rank = {}
        m = self._members.setdefault(request.group_id, {})
        m[request.request_id] = request
        self._rank.setdefault(request.request_id, len(m))
        self._queue.push(request)
        self._turns.push(request)

    def head(self) -> Request | None:
        return self._turns.due() or self._queue.head()

    def place(self, request: Request, tokens: int, engines: EngineIndex) -> EngineLoad | None:
        return balanced(request, tokens, engines)

    def started(self, request: Request) -> None:
        self._turns.placed()

    def finished(self, request: Request) -> None:
        group = self._members[request.group_id]
        del group[request.request_id]
        self.lengths.finished(request.group_id, request.generated)
        for member in group.values():
            if member.waiting:
                member.ticket += 1
                self._queue.push(member)
                self._turns.push(member)

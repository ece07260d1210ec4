"""Longest groups first, as far as finished siblings tell (Seer's context-aware scheduling, arXiv 2511.14617)."""

from __future__ import annotations

from megatron_pbsd.rollout.engine_index import EngineIndex, EngineLoad
from megatron_pbsd.rollout.length_context import LengthContext
from megatron_pbsd.rollout.queues import TURN_EVERY, GroupQueue, RequestQueue, Turns
from megatron_pbsd.rollout.routing import SPREAD, near_kv
from megatron_pbsd.rollout.scheduler import Request


class ContextAware:
    """Each group's first request is its probe. Probes go first, the one with the fewest tokens before others; then the
    request whose group has the largest estimated length, those that have begun before new ones."""

    admits = True

    def __init__(self, chunk_tokens: int, lengths: LengthContext, spread: int = SPREAD, turn_every: int = TURN_EVERY):
        self.chunk_tokens: int | None = chunk_tokens
        self.lengths, self._spread = lengths, spread
        self._probe_of: dict[str, str] = {}
        self._probes = RequestQueue(lambda request: request.generated)
        self._others = GroupQueue(lambda group: -lengths.estimate(group), lambda request: not request.begun)
        self._turns = Turns(turn_every)

    def wait(self, request: Request) -> None:
        probe = self._probe_of.setdefault(request.group_id, request.request_id)
        (self._probes if probe == request.request_id else self._others).push(request)
        self._turns.push(request)

    def head(self) -> Request | None:
        return self._turns.due() or self._probes.head() or self._others.head()

    def place(self, request: Request, tokens: int, engines: EngineIndex) -> EngineLoad | None:
        return near_kv(request, tokens, engines, self._spread)

    def started(self, request: Request) -> None:
        self._turns.placed()

    def finished(self, request: Request) -> None:
        if self.lengths.finished(request.group_id, request.generated):
            self._others.rekeyed(request.group_id)

"""To the engine with the fewest chunks in flight, but back to the one that holds the KV while that costs no balance."""

from __future__ import annotations

from megatron_pbsd.rollout.engine_index import EngineIndex, EngineLoad
from megatron_pbsd.rollout.queues import RequestQueue
from megatron_pbsd.rollout.routing import SPREAD, near_kv
from megatron_pbsd.rollout.scheduler import Request


class LeastLoaded:
    """Requests that have begun go before new ones, which would take the engine's place for their KV; otherwise first
    come, first served."""

    admits = True
    chunk_tokens: int | None = None

    def __init__(self, spread: int = SPREAD):
        self._spread = spread
        self._queue = RequestQueue(lambda request: not request.begun)

    def wait(self, request: Request) -> None:
        self._queue.push(request)

    def head(self) -> Request | None:
        return self._queue.head()

    def place(self, request: Request, tokens: int, engines: EngineIndex) -> EngineLoad | None:
        return near_kv(request, tokens, engines, self._spread)

    def started(self, request: Request) -> None:
        pass

    def finished(self, request: Request) -> None:
        pass

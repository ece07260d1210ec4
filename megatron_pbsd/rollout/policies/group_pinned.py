"""A group stays on one engine, which gets all of it at once: what synchronous systems do, and the baseline here."""

from __future__ import annotations

from megatron_pbsd.rollout.engine_index import EngineIndex, EngineLoad
from megatron_pbsd.rollout.queues import RequestQueue
from megatron_pbsd.rollout.scheduler import Request


class GroupPinned:
    """A group's first request chooses the engine with the fewest requests. Engines queue, and preempt, on their own."""

    admits = False
    chunk_tokens: int | None = None

    def __init__(self) -> None:
        self._queue = RequestQueue(lambda request: 0)
        self._engines: dict[str, EngineLoad] = {}

    def wait(self, request: Request) -> None:
        self._queue.push(request)

    def head(self) -> Request | None:
        return self._queue.head()

    def place(self, request: Request, tokens: int, engines: EngineIndex) -> EngineLoad | None:
        pinned = self._engines.get(request.group_id)
        if pinned is None or not pinned.alive:
            pinned = engines.least()
            if pinned is not None:
                self._engines[request.group_id] = pinned
        return pinned

    def started(self, request: Request) -> None:
        pass

    def finished(self, request: Request) -> None:
        pass

"""Some requests before all others: those of an earlier rollout, which wait for nothing but their end."""

from __future__ import annotations

from collections.abc import Collection

from megatron_pbsd.rollout.engine_index import EngineIndex, EngineLoad
from megatron_pbsd.rollout.queues import RequestQueue
from megatron_pbsd.rollout.scheduler import Policy, Request


class First:
    """`policy`, but requests of `groups` go before those of others, in order of submission. What starvation safeguard
    `policy` has does not hold against them: they are finitely many, and none of them is new."""

    def __init__(self, policy: Policy, groups: Collection[str]):
        self.policy, self._groups = policy, frozenset(groups)
        self.admits, self.chunk_tokens = policy.admits, policy.chunk_tokens
        self._queue = RequestQueue(lambda request: 0)

    def wait(self, request: Request) -> None:
        if request.group_id in self._groups:
            self._queue.push(request)
        else:
            self.policy.wait(request)

    def head(self) -> Request | None:
        return self._queue.head() or self.policy.head()

    def place(self, request: Request, tokens: int, engines: EngineIndex) -> EngineLoad | None:
        return self.policy.place(request, tokens, engines)

    def started(self, request: Request) -> None:
        if request.group_id not in self._groups:
            self.policy.started(request)

    def finished(self, request: Request) -> None:
        if request.group_id not in self._groups:
            self.policy.finished(request)

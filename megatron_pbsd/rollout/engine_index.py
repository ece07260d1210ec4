"""Engines in order of load: the least loaded one in O(log n), whatever changes in between."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_pbsd.rollout.scheduler import Request


@dataclass(eq=False, slots=True)
class EngineLoad:
    """One engine as the scheduler sees it.

    slots:      chunks it runs at a time (may be infinite).
    kv_tokens:  tokens of KV it has memory for; None: its KV is not the scheduler's business.
    reserved:   tokens of KV that its chunks may have come to need when they end.
    """

    name: str
    slots: float
    kv_tokens: int | None
    order: int
    running: dict[str, Request] = field(default_factory=dict)
    in_flight: int = 0
    reserved: int = 0
    alive: bool = True
    version: int = 0

    @property
    def load(self) -> int:
        """Comparable between engines: chunks in flight, or where KV counts, minus the tokens of KV that are free."""
        return self.in_flight if self.kv_tokens is None else self.reserved - self.kv_tokens

    def fits(self, tokens: int) -> bool:
        """Whether a chunk that may come to need so many tokens of KV can start now. An engine without any chunk takes
        one of any size, or nobody would."""
        return self.in_flight < self.slots and (
            self.kv_tokens is None or self.reserved + tokens <= self.kv_tokens or not self.in_flight)


class EngineIndex:
    """A heap by load with lazy deletion: every change of an engine adds an entry and outdates its last one."""

    def __init__(self) -> None:
        self._engines: dict[str, EngineLoad] = {}
        self._heap: list[tuple[int, int, int, EngineLoad]] = []
        self._joined = 0

    def __len__(self) -> int:
        return len(self._engines)

    def __iter__(self) -> Iterator[EngineLoad]:
        return iter(self._engines.values())

    def get(self, name: str) -> EngineLoad | None:
        return self._engines.get(name)

    def join(self, name: str, slots: float, kv_tokens: int | None) -> EngineLoad:
        engine = self._engines[name] = EngineLoad(name, slots, kv_tokens, self._joined)
        self._joined += 1
        self._entered(engine)
        return engine

    def lose(self, name: str) -> EngineLoad:
        """It is given nothing more; what runs on it may still end."""
        engine = self._engines.pop(name)
        engine.alive = False
        engine.version += 1
        return engine

    def started(self, engine: EngineLoad, request: Request, reserved: int) -> None:
        engine.running[request.request_id] = request
        engine.in_flight += 1
        engine.reserved += reserved
        self._entered(engine)

    def ended(self, engine: EngineLoad, request: Request, reserved: int) -> None:
        del engine.running[request.request_id]
        engine.in_flight -= 1
        engine.reserved -= reserved
        self._entered(engine)

    def _entered(self, engine: EngineLoad) -> None:
        engine.version += 1
        if engine.alive and engine.in_flight < engine.slots:
            heapq.heappush(self._heap, (engine.load, engine.order, engine.version, engine))
        if len(self._heap) > 64 + 8 * len(self._engines):
            self._heap = [(e.load, e.order, e.version, e) for e in self if e.in_flight < e.slots]
            heapq.heapify(self._heap)

    def least(self) -> EngineLoad | None:
        """The least loaded engine with a free slot; of equal ones that which joined first."""
        heap = self._heap
        while heap:
            _, _, version, engine = heap[0]
            if version == engine.version:
                return engine
            heapq.heappop(heap)
        return None

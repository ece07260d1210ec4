"""To the engine with the fewest chunks in flight, but back to the one that holds the KV while that costs no balance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_pbsd.rollout.scheduler import EngineLoad, Waiting


@dataclass(frozen=True)
class LeastLoaded:
    """A request stays with the engine that holds its KV as long as that one has no more than `spread` chunks in flight
    above the least loaded (Seer, arXiv 2511.14617, uses 32).

    Requests that have begun go before new ones, which would take the engine's place for their KV; otherwise first come,
    first served.
    """

    spread: int = 32

    def choose(self, waiting: Mapping[str, Waiting], engines: Mapping[str, EngineLoad]) -> tuple[str, str] | None:
        free = [engine for engine in engines.values() if engine.free > 0]
        if not free or not waiting:
            return None
        first = next(iter(waiting.values()))
        request = next((w for w in waiting.values() if w.holder is not None), first)
        least = min(free, key=lambda engine: engine.in_flight)
        holder = engines.get(request.holder) if request.holder is not None else None
        if holder is not None and holder.free > 0 and holder.in_flight - least.in_flight <= self.spread:
            return request.request_id, holder.name
        return request.request_id, least.name

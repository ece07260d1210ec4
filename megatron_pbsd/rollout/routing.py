"""Where a chunk goes."""

from __future__ import annotations

from megatron_pbsd.rollout.engine_index import EngineIndex, EngineLoad
from megatron_pbsd.rollout.scheduler import Request

SPREAD = 32
"""Chunks that an engine may have in flight above the least loaded one before KV moves away from it (Seer,
arXiv 2511.14617)."""


def near_kv(request: Request, tokens: int, engines: EngineIndex, spread: int = SPREAD) -> EngineLoad | None:
    """Back to the engine that holds the request's KV as long as it fits there and costs no balance, else to the least
    loaded; None if it fits neither."""
    least = engines.least()
    if least is None:
        return None
    holder = request.holder
    if holder is not None and holder.alive and holder.in_flight - least.in_flight <= spread and holder.fits(tokens):
        return holder
    return least if least.fits(tokens) else None


def balanced(request: Request, tokens: int, engines: EngineIndex) -> EngineLoad | None:
    """Back to the engine that holds the request's KV unless another has so much less to do that the request would not
    make it the busier of the two. Where KV is cheap to move, an uneven load costs more than moves."""
    least = engines.least()
    if least is None:
        return None
    holder = request.holder
    if holder is not None and holder.alive and holder.fits(tokens):
        weight = 1 if holder.kv_tokens is None else tokens
        if holder.load - least.load <= weight:
            return holder
    return least if least.fits(tokens) else None

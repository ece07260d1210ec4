"""Requests in chunks, any of which may run on any engine (Seer's divided rollout, arXiv 2511.14617)."""

from __future__ import annotations

from megatron_pbsd.rollout.policies.least_loaded import LeastLoaded
from megatron_pbsd.rollout.routing import SPREAD


class Divided(LeastLoaded):
    """As `LeastLoaded`, a chunk at a time: an engine is never asked for more KV than it has, because a chunk's growth
    is bounded."""

    def __init__(self, chunk_tokens: int, spread: int = SPREAD):
        super().__init__(spread)
        self.chunk_tokens = chunk_tokens

"""Longest first by true lengths, which only a simulation knows: the bound for policies that have to learn them."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_pbsd.rollout.policies.divided import Divided
from megatron_pbsd.rollout.queues import RequestQueue
from megatron_pbsd.rollout.routing import SPREAD


class Oracle(Divided):
    """lengths: tokens each request will generate."""

    def __init__(self, chunk_tokens: int, lengths: Mapping[str, int], spread: int = SPREAD):
        super().__init__(chunk_tokens, spread)
        self._queue = RequestQueue(lambda request: -lengths[request.request_id])

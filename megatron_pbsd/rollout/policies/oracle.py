"""By true lengths, which only a simulation knows: bounds for policies that have to learn them."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_pbsd.rollout.length_model import LengthModel
from megatron_pbsd.rollout.policies.divided import Divided
from megatron_pbsd.rollout.policies.longest_remaining import LongestRemaining
from megatron_pbsd.rollout.queues import RequestQueue
from megatron_pbsd.rollout.routing import SPREAD
from megatron_pbsd.rollout.scheduler import Request


class Oracle(Divided):
    """Longest first. lengths: tokens each request will generate."""

    def __init__(self, chunk_tokens: int, lengths: Mapping[str, int], spread: int = SPREAD):
        super().__init__(chunk_tokens, spread)
        self._queue = RequestQueue(lambda request: -lengths[request.request_id])


class ToldOracle(LongestRemaining):
    """Knows nothing of a group until one of it has finished, and all about it from then on: what cannot be learned
    sooner by watching. true_lengths: tokens each request will generate."""

    def __init__(self, chunk_tokens: int, limit: int, true_lengths: Mapping[str, int]):
        super().__init__(chunk_tokens, LengthModel(limit))
        self._limit, self._true_lengths = limit, true_lengths

    def _urgency(self, request: Request) -> float:
        known = self.lengths.known(request.group_id)
        return (self._true_lengths[request.request_id] if known else self._limit) - request.generated

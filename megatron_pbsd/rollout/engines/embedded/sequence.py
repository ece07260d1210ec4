"""The engine's state of one chunk: its context so far, and how much of that lies in the cache."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np

from megatron_pbsd.rollout.drafting.draft_tree import NO_DRAFT, DraftTree
from megatron_pbsd.rollout.engines.embedded.sampling import request_key
from megatron_pbsd.rollout.engines.protocol import Chunk, ChunkResult
from megatron_pbsd.trajectory import FinishReason, VersionSpan


class Kind(IntEnum):
    """What a sequence does in a step."""

    DECODES = 0
    VERIFIES = 1
    READS = 2


@dataclass(eq=False)
class Sequence:
    """tokens: context and what was generated. computed: how many of them have their KV in `slot`.

    limit: length of `tokens` at which the chunk ends for want of room. cached: tokens whose KV was found at admission.
    read_from: the first token that was read by this chunk itself. draft: what the next step is to verify.
    """

    chunk: Chunk
    tokens: list[int]
    limit: int
    key: int
    stop_token_ids: frozenset[int]
    slot: int = -1
    computed: int = 0
    cached: int = 0
    read_from: int = 0
    draft: DraftTree = NO_DRAFT
    log_probs: list[float] = field(default_factory=list)
    version_starts: list[tuple[int, int]] = field(default_factory=list)

    @classmethod
    def of(cls, chunk: Chunk, max_context: int) -> Sequence:
        limit = min(len(chunk.tokens) + chunk.max_new_tokens, max_context)
        key = request_key(chunk.seed, chunk.request_id)
        return cls(chunk, list(chunk.tokens), limit, key, frozenset(chunk.stop_token_ids))

    @property
    def request_id(self) -> str:
        return self.chunk.request_id

    @property
    def kind(self) -> Kind:
        """A sequence that reads more than its last token has no draft."""
        if len(self.tokens) - self.computed > 1:
            return Kind.READS
        return Kind.VERIFIES if self.draft else Kind.DECODES

    @property
    def unread(self) -> list[int]:
        """What the next step reads: tokens without KV, at least one, and the draft after them."""
        return [*self.tokens[self.computed :], *self.draft.tokens]

    @property
    def positions(self) -> list[int]:
        """Of `unread`: how many tokens there are before each, by the path that it is on."""
        last = len(self.tokens) - 1
        return [*range(self.computed, last + 1), *(last + depth for depth in self.draft.depths)]

    def admit(self, slot: int, cached: int) -> None:
        """The chunk runs from now on, in `slot`, where `cached` tokens have their KV."""
        self.slot = slot
        self.computed = self.cached = self.read_from = cached

    def forget(self) -> None:
        """The KV is lost: everything is to be read again."""
        self.computed = self.read_from = 0

    @property
    def routed(self) -> slice | None:
        """The tokens whose experts are to be reported, if that was asked for."""
        asked = self.chunk.routed_from
        return None if asked is None else slice(min(asked, self.read_from), self.computed)

    def append(self, token: int, log_prob: float, version: int) -> FinishReason | None:
        """Add a sampled token; the reason to end, if it is the last one."""
        if not self.version_starts or self.version_starts[-1][0] != version:
            self.version_starts.append((version, len(self.log_probs)))
        self.computed = len(self.tokens)
        self.tokens.append(token)
        self.log_probs.append(log_prob)
        if token in self.stop_token_ids:
            return "stop"
        return "length" if len(self.tokens) >= self.limit else None

    def result(self, reason: FinishReason, routed_experts: np.ndarray | None = None) -> ChunkResult:
        """routed_experts: those of `routed`."""
        ends = [start for _, start in self.version_starts[1:]] + [len(self.log_probs)]
        return ChunkResult(
            request_id=self.request_id,
            tokens=tuple(self.tokens[len(self.chunk.tokens) :]),
            log_probs=tuple(self.log_probs),
            finish_reason=reason,
            cached_tokens=self.cached,
            versions=tuple(VersionSpan(v, start, end) for (v, start), end in zip(self.version_starts, ends)),
            routed_experts=routed_experts,
            routed_from=0 if routed_experts is None else self.routed.start,
        )

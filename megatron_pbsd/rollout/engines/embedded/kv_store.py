"""Where an engine finds the KV of a chunk's context, and what becomes of it afterwards.

A context's KV may be in the slot where the trajectory's last chunk ran, parked in host memory by this engine or
another, or, as far as its beginning goes, in the slot of a sibling. What is found nowhere is computed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from megatron_pbsd.rollout.engines.embedded.kv_cache import SlotCache, SlotTable, common_prefix
from megatron_pbsd.rollout.engines.embedded.kv_pool import KVPool, PoolPlace
from megatron_pbsd.rollout.engines.embedded.sequence import Sequence
from megatron_pbsd.rollout.engines.protocol import KVCounters

LEAST_SHARED = 16
"""Fewer tokens of a sibling's are computed as fast as they are copied and waited for."""


class KVStore:
    """slots: chunks that run at once. pool: None parks nothing. running: the engine's running sequences, by request."""

    def __init__(self, cache: SlotCache, slots: int, pool: PoolPlace | None, engine: str,
                 running: Mapping[str, Sequence]):
        self._cache, self._running = cache, running
        self._table = SlotTable(slots, evicting=self._park)
        self._pool = None if pool is None or not pool.budget else KVPool(pool, engine)
        self._siblings: dict[str, list[str]] = {}
        self._version = 0
        self._slot_tokens = self._sibling_tokens = self._restored = self._restored_tokens = 0
        self._moved_in = self._moved_in_tokens = 0

    def __len__(self) -> int:
        """Requests that do not run and whose KV is in a slot."""
        return len(self._table)

    @property
    def all_slots_run(self) -> bool:
        return self._table.all_run

    def admit(self, sequence: Sequence, waiting: Collection[str]) -> None:
        """Give the sequence a slot, of which one must not run, with as much of its KV as there is. Requests in
        `waiting` keep theirs as long as there are others."""
        sibling, shared = self._sibling(sequence)
        slot, cached = self._table.acquire(sequence.request_id, sequence.tokens, waiting)
        self._slot_tokens += cached
        if not cached and self._pool is not None:
            cached = self._restore(sequence, slot)
        # Whoever has lost its slot to this sequence has left it as it was.
        if sibling is not None and shared > cached:
            self._cache.copy(sibling, slot, shared)
            self._sibling_tokens += shared - cached
            cached = shared
        sequence.admit(slot, cached)
        if group := sequence.chunk.group_id:
            members = self._siblings.setdefault(group, [])
            if sequence.request_id not in members:
                members.append(sequence.request_id)

    def should_wait(self, sequence: Sequence) -> bool:
        """Whether a running sibling is about to compute what this one could copy after the next step."""
        if sequence.chunk.kv_from is not None or self._has_own(sequence.request_id):
            return False
        _, shared = self._sibling(sequence)
        return any(common_prefix(sibling.tokens, sequence.tokens) >= max(shared, sibling.computed) + LEAST_SHARED
                   for request_id in self._siblings.get(sequence.chunk.group_id, ())
                   if (sibling := self._running.get(request_id)) is not None)

    def _has_own(self, request_id: str) -> bool:
        return self._table.kept(request_id) is not None or (self._pool is not None and request_id in self._pool)

    def _sibling(self, sequence: Sequence) -> tuple[int | None, int]:
        """The slot with the longest common beginning in the sequence's group, and its length: 0 if it is too short."""
        best, longest = None, LEAST_SHARED - 1
        members = self._siblings.get(sequence.chunk.group_id, ())
        for request_id in [name for name in members if name != sequence.request_id]:
            if (runs := self._running.get(request_id)) is not None:
                slot, shared = runs.slot, min(common_prefix(runs.tokens, sequence.tokens), runs.computed)
            elif (kept := self._table.kept(request_id)) is not None:
                slot, shared = kept[0], common_prefix(kept[1], sequence.tokens)
            else:
                members.remove(request_id)
                continue
            shared = min(shared, len(sequence.tokens) - 1)
            if shared > longest:
                best, longest = slot, shared
        return (None, 0) if best is None else (best, longest)

    def _restore(self, sequence: Sequence, slot: int) -> int:
        pool, request_id, tokens = self._pool, sequence.request_id, sequence.tokens
        source = sequence.chunk.kv_from
        moved = source is not None and pool.take(request_id, self._form, tokens, self._cache.row_bytes, source)
        found = min(pool.find(request_id, self._form, tokens), len(tokens) - 1)
        if not found:
            return 0
        self._cache.restore(slot, 0, pool.read(request_id, 0, found))
        if moved:
            self._moved_in += 1
            self._moved_in_tokens += found
        else:
            self._restored += 1
            self._restored_tokens += found
        return found

    @property
    def _form(self) -> str:
        return f"{self._version}-{self._cache.row_bytes}"

    def _park(self, request_id: str, slot: int, computed: list[int]) -> None:
        if self._pool is not None and computed:
            self._pool.park(
                request_id, self._form, computed, lambda start, end: self._cache.rows(slot, start, end))

    def retire(self, sequence: Sequence) -> None:
        """Its chunk has ended: the KV stays in its slot until another needs it."""
        computed = sequence.tokens[: sequence.computed]
        self._table.retire(sequence.request_id, sequence.slot, computed)
        if self._pool is not None and self._pool.place.shared:
            self._park(sequence.request_id, sequence.slot, computed)

    def release(self, request_id: str) -> None:
        self._table.release(request_id)
        if self._pool is not None:
            self._pool.release(request_id)

    def hand_over(self, request_id: str) -> None:
        """Forget the request, but leave what is parked to the engine that goes on with it."""
        self._table.release(request_id)
        if self._pool is not None:
            self._pool.hand_over(request_id)

    def forget(self, version: int) -> None:
        """All KV is outdated: weights are of this version, or more is kept of each token from now on."""
        self._table.clear()
        if self._pool is not None:
            self._pool.clear()
        self._siblings.clear()
        self._version = version
        for sequence in self._running.values():
            sequence.forget()

    def counters(self) -> KVCounters:
        found = dict(slot_tokens=self._slot_tokens, sibling_tokens=self._sibling_tokens, restored=self._restored,
                     restored_tokens=self._restored_tokens, moved_in=self._moved_in,
                     moved_in_tokens=self._moved_in_tokens)
        return KVCounters(**found, **(vars(self._pool.counters) if self._pool is not None else {}))

"""The engine protocol: what the coordinator may ask of anything that generates tokens.

`embedded` runs in process; a server behind HTTP fits the same calls. Every method but `interrupt` is called from one
thread.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from megatron_pbsd.errors import Lost, PbsdError
from megatron_pbsd.trajectory import FinishReason, VersionSpan

if TYPE_CHECKING:  # which need torch; a coordinator does not
    from megatron_pbsd.models.sglang import ServerParallel
    from megatron_pbsd.platform.process_group import GroupPlace
    from megatron_pbsd.platform.usage import MemoryUse
    from megatron_pbsd.resharding.arrival import Arriving
    from megatron_pbsd.resharding.manifest import WeightsManifest
    from megatron_pbsd.resharding.stream import Described


MEMORY_TAGS = ("kv_cache", "weights")
"""What an engine can give the memory of away, and take back."""


class EngineError(PbsdError):
    """An engine could not do what it was asked; the message names the engine, the request and the cause."""

    component = "rollout"


class EngineDied(Lost, EngineError):
    """What an engine needs to go on, a server say, is gone, or must not go on: another has to take its place."""

    def __str__(self) -> str:
        tail = "".join(f"\n  {self.name} | {line}" for line in self.last_lines)
        return f"engine {self.name!r}: {self.cause}" + (f"\nThe end of its log:{tail}" if tail else "")


@dataclass(frozen=True)
class SiblingTokens:
    """Tokens `[start, start + n)` of a request of the same group, prompt and observations included."""

    request_id: str
    start: int
    tokens: Sequence[int]


@dataclass(frozen=True)
class Chunk:
    """A request to continue `tokens` by at most `max_new_tokens`.

    request_id:   one per trajectory. The engine may keep the KV of a finished chunk under this id, so that the next
                  chunk of the trajectory (whose `tokens` begin with what was seen) prefills only what is new.
    seed:         key of counter-based sampling together with `request_id` and the absolute position of the sampled
                  token: the same chunk gives the same tokens whatever else runs beside it, and however it is cut.
    temperature:  0 is greedy. Log-probs are always reported at temperature 1.
    stop_token_ids:  generation ends after any of these; the stop token is part of the result.
    routed_from:  asks which experts read each token from this position on; None does not ask. A trajectory asks in all
                  its chunks, each time for what it does not know yet.
    kv_from:      the engine that ran the trajectory's last chunk, if its parked KV is to be fetched from there.
    group_id:     trajectories of one prompt share it; what their contexts have in common is computed once, and they are
                  drafted for from each other. Empty: none.
    siblings:     what others of the group have read and generated at other engines, to draft from.
    priority:     an engine that has to choose which chunks to begin, or to keep, may choose larger ones.
    """

    request_id: str
    tokens: tuple[int, ...]
    max_new_tokens: int
    seed: int
    temperature: float = 1.0
    stop_token_ids: tuple[int, ...] = ()
    routed_from: int | None = None
    kv_from: str | None = None
    group_id: str = ""
    siblings: tuple[SiblingTokens, ...] = ()
    priority: int = 0


def fault_of(tokens: Sequence[int], vocabulary: int) -> str | None:
    """What is wrong with token ids that a model is to read."""
    if not len(tokens):
        return "has no tokens"
    if min(tokens) < 0 or max(tokens) >= vocabulary:
        return f"has token ids outside of the vocabulary [0, {vocabulary})"
    return None


def fault_of_chunk(chunk: Chunk, vocabulary: int, max_context: int) -> str | None:
    """Why no engine of such a model can run it."""
    known = len(chunk.tokens)
    if fault := fault_of(chunk.tokens, vocabulary):
        return fault
    if known >= max_context:
        return f"has {known} tokens of context: no room below max_context {max_context}"
    if chunk.max_new_tokens < 1:
        return f"has max_new_tokens {chunk.max_new_tokens}, expected at least 1"
    if chunk.temperature < 0:
        return f"has temperature {chunk.temperature}, expected 0 (greedy) or more"
    if chunk.routed_from is not None and not 0 <= chunk.routed_from <= known:
        return f"has routed_from {chunk.routed_from}, expected 0 … {known}, its tokens, or None"
    return None


@dataclass(frozen=True)
class ChunkResult:
    """tokens/log_probs: the new tokens alone. cached_tokens: prompt tokens that were not prefilled again.

    routed_experts: int16 [n, MoE layers, top-k], the experts that read tokens `[routed_from, routed_from + n)` of the
        chunk's context and new tokens, in the order of choice. They are those of the pass whose KV is in use: they
        reach further back than was asked where older tokens were read again, and end where nothing has been read yet
        (before the newest token). None when not asked for, when nothing was run, and from dense models.
    """

    request_id: str
    tokens: tuple[int, ...]
    log_probs: tuple[float, ...]
    finish_reason: FinishReason
    cached_tokens: int
    versions: tuple[VersionSpan, ...]
    routed_experts: np.ndarray | None = None
    routed_from: int = 0


@dataclass(frozen=True)
class KVCounters:
    """Where the KV of chunks' contexts came from, and what became of it; counters since the engine started.

    slot_tokens:     found in the slot of the trajectory's last chunk.
    sibling_tokens:  copied from a sibling's slot.
    restored, restored_tokens:  contexts, and tokens of them, brought back from host memory.
    moved_in, moved_in_tokens, moved_out:  the same from what another engine had parked; contexts left to others.
    parks, parked_tokens:  times that KV was copied to host memory, and tokens of it.
    dropped_tokens:  parked, or to be parked, for which there was no room.
    bytes:           of host memory in use now.
    """

    slot_tokens: int = 0
    sibling_tokens: int = 0
    restored: int = 0
    restored_tokens: int = 0
    moved_in: int = 0
    moved_in_tokens: int = 0
    moved_out: int = 0
    parks: int = 0
    parked_tokens: int = 0
    dropped_tokens: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class EngineStatistics:
    """Counters since the engine started, gauges as they are now. kv_tokens: tokens whose KV it has memory for.
    drafts, drafted_tokens, accepted_tokens: drafts that were verified, their tokens, and those that were kept."""

    version: int
    running: int
    waiting: int
    cached_requests: int
    generated_tokens: int
    prefilled_tokens: int
    cached_tokens: int
    decode_steps: int
    busy_seconds: float
    kv_tokens: int = 0
    kv: KVCounters = KVCounters()
    drafts: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0


class Engine(Protocol):
    def submit(self, chunks: Sequence[Chunk]) -> None:
        """Queue chunks. EngineError on a duplicate running id or a context that can never fit."""

    def collect(self) -> list[ChunkResult]:
        """Work until at least one chunk has ended and return all that have. Empty only when nothing is queued, or
        when it was interrupted."""

    def interrupt(self) -> None:
        """Let `collect`, the one that runs or the next, return as soon as it can, be it with nothing; until `abort` is
        called. This alone may be called from another thread."""

    def abort(self, request_ids: Sequence[str]) -> None:
        """End these chunks; what they generated comes back from `collect` with finish_reason 'abort'. Unknown ids are
        ignored."""

    def release(self, request_ids: Sequence[str]) -> None:
        """Forget cached KV of trajectories that are over. Unknown ids are ignored."""

    def hand_over(self, request_ids: Sequence[str]) -> None:
        """The same for trajectories that go on at other engines, which may fetch what is parked of them."""

    def update_weights(self, manifest: WeightsManifest, version: int) -> None:
        """Copy every tensor of the manifest into the parameters in place; drops all cached KV.

        EngineError naming the tensor when one is missing, unexpected, or of another shape or dtype.
        """

    def begin_update(self, tensors: Described, version: int, base: int | None = None) -> None:
        """The same in parts: from here on `submit`, `collect` and `score` are an EngineError, until `end_update`. May
        be called again, to begin anew.

        tensors: all that there are, compared as in `update_weights` before anything changes. base: the version that
        those that do not arrive are left at; EngineError when the engine has another. None: all will arrive.
        """

    def load(self, bucket: Arriving) -> None:
        """Copy these tensors into the parameters. EngineError or EngineDied leave the update without an end."""

    def end_update(self) -> None:
        """The engine has the version that `begin_update` named. EngineError naming tensors that have not arrived."""

    def join_group(self, place: GroupPlace, rank: int) -> ServerParallel | None:
        """Join the group that later buckets are sent in, the first of the engine's ranks as `rank`; an earlier one is
        left. Returns how its ranks divide the model, if each can be sent its part alone (`arrival.Scattered`)."""

    def write_weights(self, manifest: WeightsManifest) -> None:
        """Copy every parameter to its tensor of the manifest: the reverse of `update_weights`, with the same errors."""

    def sleep(self, tags: Collection[str]) -> None:
        """Give the memory of these away, of `MEMORY_TAGS`; what has been given away already stays so.

        EngineError while chunks are in flight. Until it has woken, and weights until they have been published again
        besides, everything that needs one of them raises EngineError.
        """

    def wake(self, tags: Collection[str]) -> None:
        """Take the memory of these back. The KV cache is empty then, whatever was parked of it included, and weights
        are undefined: `update_weights` must follow."""

    def memory(self) -> MemoryUse:
        """Bytes that it holds now, by tag; and what its processes use, if it computes on a CPU."""

    def checksums(self) -> dict[str, str]:
        """HF tensor name → checksum of the bytes the engine computes with (resharding.checksum)."""

    def score(self, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Log-prob of each token given its predecessors, float32 [T_i]; position 0 is 0. Uses no cache."""

    def statistics(self) -> EngineStatistics:
        """See EngineStatistics."""

"""The embedded engine: continuous batching over KV slots, in the caller's process and thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Sequence as Sequences
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from megatron_pbsd.platform.process_group import GroupPlace
from megatron_pbsd.platform.usage import MemoryUse, give_back_freed, of_process
from megatron_pbsd.resharding.arrival import Arrivals, Arriving
from megatron_pbsd.resharding.checksum import checksum
from megatron_pbsd.resharding.manifest import WeightsManifest
from megatron_pbsd.resharding.stream import Described
from megatron_pbsd.rollout.drafting.draft_tree import NO_DRAFT, ROOT
from megatron_pbsd.rollout.engines.embedded.kv_cache import SlotCache
from megatron_pbsd.rollout.engines.embedded.kv_pool import PoolPlace
from megatron_pbsd.rollout.engines.embedded.kv_store import KVStore
from megatron_pbsd.rollout.engines.embedded.model import PackedModel
from megatron_pbsd.rollout.engines.embedded.padding import padded_keys
from megatron_pbsd.rollout.engines.embedded.sampling import sample, uniforms
from megatron_pbsd.rollout.engines.embedded.sequence import Sequence
from megatron_pbsd.rollout.engines.embedded.weights import check_tensors, checkpoint_views, copy_held, copy_into
from megatron_pbsd.rollout.engines.occupancy import Occupancy
from megatron_pbsd.rollout.engines.protocol import (
    Chunk,
    ChunkResult,
    EngineError,
    EngineStatistics,
    fault_of,
    fault_of_chunk,
)
from megatron_pbsd.rollout.engines.update import Update, check_between
from megatron_pbsd.trajectory import FinishReason

if TYPE_CHECKING:  # which needs numba; an engine that does not speculate does not
    from megatron_pbsd.rollout.engines.embedded.speculation import Speculation

T = TypeVar("T")
# Bound the activations of one forward pass; a single longer sequence still goes through whole.
PREFILL_TOKENS_PER_STEP = 4096
SCORED_TOKENS_PER_PASS = 1024


class EmbeddedEngine:
    """See `protocol.Engine`. One step computes the uncached tokens of all running chunks in one packed batch.

    model_path: local Hugging Face folder. slots: chunks that run at once, and contexts whose KV is kept.
    max_context: most tokens of a trajectory, prompt and observations included. threads: torch threads of the process.
    load_weights: False leaves the weights to the first publication. kv_pool: where KV is parked that loses its slot or
    may go to another engine; None parks nothing. speculation: drafts tokens, which changes nothing but the time it
    takes; None does not.
    """

    def __init__(
        self,
        model_path: str,
        *,
        name: str,
        slots: int,
        max_context: int,
        device: str = "cpu",
        dtype: str = "float32",
        threads: int = 1,
        load_weights: bool = True,
        kv_pool: PoolPlace | None = None,
        speculation: Speculation | None = None,
    ) -> None:
        self.name = name
        self._slots, self._max_context = slots, max_context
        torch.set_num_threads(threads)
        try:
            self._model = PackedModel(model_path, max_context, device, dtype, load_weights)
            self._parameters = checkpoint_views(self._model.module)
            # A draft's nodes have places of their own, also where its paths end with the context.
            beside = speculation.nodes_beside_a_path if speculation else 0
            self._cache = SlotCache(slots, padded_keys(max_context + beside))
            self._model.warm_up(self._cache)
        except (OSError, ValueError, NotImplementedError) as error:
            raise EngineError(f"engine {name!r}: cannot load {model_path!r}: {error}") from error
        self._waiting: dict[str, Sequence] = {}
        self._running: dict[str, Sequence] = {}
        self._kv = KVStore(self._cache, slots, kv_pool, name, self._running)
        self._speculation = speculation
        self._occupancy = Occupancy(name)
        self._ended: list[ChunkResult] = []
        self._interrupted = threading.Event()
        self._version = 0
        self._update: Update | None = None
        self._arrivals = Arrivals(torch.device(device))
        self._generated = self._prefilled = self._cached = self._steps = 0
        self._busy_seconds = 0.0

    def submit(self, chunks: Sequences[Chunk]) -> None:
        check_between(self.name, self._update)
        if chunks:
            self._occupancy.require("generation")
        arriving = {}
        for chunk in chunks:
            self._check(chunk, arriving)
            arriving[chunk.request_id] = Sequence.of(chunk, self._max_context)
        if any(chunk.routed_from is not None for chunk in chunks):
            self._record_experts()
        if self._speculation is not None:
            for chunk in chunks:
                self._speculation.learn(chunk)
        self._waiting.update(arriving)

    def _check(self, chunk: Chunk, arriving: dict[str, Sequence]) -> None:
        fault = fault_of_chunk(chunk, self._model.vocab_size, self._max_context)
        if any(chunk.request_id in known for known in (self._running, self._waiting, arriving)):
            fault = "is already running"
        if fault:
            raise EngineError(f"engine {self.name!r}: request {chunk.request_id!r} {fault}")

    def _record_experts(self) -> None:
        """From the first chunk that asks. What was read before that has no experts, and is read again."""
        try:
            if self._model.record_experts():
                self._kv.forget(self._version)
        except ValueError as error:
            raise EngineError(f"engine {self.name!r}: routed experts are not available: {error}") from error

    def collect(self) -> list[ChunkResult]:
        check_between(self.name, self._update)
        start = time.perf_counter()
        with torch.inference_mode():
            while not (self._ended or self._interrupted.is_set()) and (self._running or self._waiting):
                self._step()
        self._busy_seconds += time.perf_counter() - start
        ended, self._ended = self._ended, []
        return ended

    def _step(self) -> None:
        self._admit()
        if self._speculation is not None:
            self._speculation.propose(self._running.values())
        running = sorted(self._running.values(), key=lambda s: (s.kind, s.slot))
        counts = [len(s.tokens) - s.computed for s in running]
        self._prefilled += sum(n for n, s in zip(counts, running) if n > 1 or not s.log_probs)
        logits = self._model.next_logits(running, self._cache)
        rows = [(s, depth) for s in running for depth in (0, *s.draft.depths)]
        keys = np.array([s.key for s, _ in rows], dtype=np.uint64)
        positions = np.array([len(s.tokens) + depth for s, depth in rows], dtype=np.uint64)
        temperatures = np.array([s.chunk.temperature for s, _ in rows])
        try:
            tokens, log_probs = sample(logits, temperatures, uniforms(keys, positions))
        except FloatingPointError as error:
            names = list(dict.fromkeys(rows[row][0].request_id for row in error.args[0]))
            raise EngineError(f"engine {self.name!r}: logits are not finite for requests {names}") from error
        self._take(running, tokens, log_probs)
        self._steps += 1

    def _take(self, running: list[Sequence], tokens: list[int], log_probs: list[float]) -> None:
        """tokens, log_probs: sampled after each sequence and each node of its draft, end to end."""
        drafts, kept, sampled, start = [s.draft for s in running], [], [], 0
        for draft in drafts:
            end = start + 1 + len(draft)
            kept.append(draft.accepted(tokens[start:end]))
            sampled.append([start + 1 + node for node in (ROOT, *kept[-1])])
            start = end
        self._close_up(running, kept)
        for sequence, rows in zip(running, sampled):
            self._append(sequence, [tokens[row] for row in rows], [log_probs[row] for row in rows])
        if self._speculation is not None:
            self._speculation.verified(drafts, kept)

    def _close_up(self, running: list[Sequence], kept: list[list[int]]) -> None:
        """Move what the cache holds of accepted nodes to where their tokens are to be. kept: nodes of each draft."""
        moves = [(s.slot, len(s.tokens) + node, len(s.tokens) + i)
                 for s, nodes in zip(running, kept) for i, node in enumerate(nodes) if node != i]
        if moves:
            self._cache.move(*torch.tensor(moves, device=self._model.device).unbind(1))

    def _append(self, sequence: Sequence, tokens: list[int], log_probs: list[float]) -> None:
        sequence.draft = NO_DRAFT
        for token, log_prob in zip(tokens, log_probs):
            self._generated += 1
            if reason := sequence.append(token, log_prob, self._version):
                return self._end(sequence, reason)

    def _admit(self) -> None:
        """Start waiting chunks in order of arrival, as far as slots and the prefill bound allow. Those whose prompt a
        sibling is about to compute are left for the next step."""
        prefill = sum(len(s.tokens) - s.computed for s in self._running.values())
        for request_id, sequence in list(self._waiting.items()):
            if prefill >= PREFILL_TOKENS_PER_STEP or self._kv.all_slots_run:
                return
            if self._kv.should_wait(sequence):
                continue
            self._kv.admit(sequence, self._waiting)
            self._cached += sequence.computed
            prefill += len(sequence.tokens) - sequence.computed
            self._running[request_id] = self._waiting.pop(request_id)

    def _end(self, sequence: Sequence, reason: FinishReason) -> None:
        del self._running[sequence.request_id]
        self._kv.retire(sequence)
        if self._speculation is not None:
            self._speculation.remember(sequence)
        experts = self._cache.experts_of(sequence.slot, sequence.routed) if sequence.routed else None
        self._ended.append(sequence.result(reason, experts))

    def interrupt(self) -> None:
        self._interrupted.set()

    def abort(self, request_ids: Sequences[str]) -> None:
        self._interrupted.clear()
        for request_id in request_ids:
            if request_id in self._running:
                self._end(self._running[request_id], "abort")
            elif request_id in self._waiting:
                self._ended.append(self._waiting.pop(request_id).result("abort"))

    def release(self, request_ids: Sequences[str]) -> None:
        for request_id in request_ids:
            self._kv.release(request_id)

    def hand_over(self, request_ids: Sequences[str]) -> None:
        for request_id in request_ids:
            self._kv.hand_over(request_id)

    def update_weights(self, manifest: WeightsManifest, version: int) -> None:
        """Chunks that run continue under the new weights; their context is prefilled again."""
        before = self._update
        self.begin_update(manifest.described, version)
        try:
            self.load(manifest)
        except EngineError:
            self._update = before  # a segment that cannot be had has changed nothing
            raise
        self.end_update()

    def begin_update(self, tensors: Described, version: int, base: int | None = None) -> None:
        self._occupancy.require_memory(f"weights version {version}")
        held = None if self._update or not self._occupancy.has_weights else self._version
        update = Update.begun(self.name, tensors, version, base, held)
        self._checked(version, check_tensors, tensors, self._parameters)
        self._update = update

    def load(self, bucket: Arriving) -> None:
        self._update.arrived(self._checked(self._update.version, self._copy, bucket))

    def _copy(self, bucket: Arriving) -> Collection[str]:
        tensors = self._arrivals.tensors(bucket)
        with torch.inference_mode():
            copy_into(tensors, self._parameters)
        return tensors.keys()

    def end_update(self) -> None:
        self._version = self._update.ended()
        self._update, self._occupancy.has_weights = None, True
        self._arrivals.ended()
        if "kv_cache" not in self._occupancy.asleep:
            with torch.inference_mode():
                self._cache.wipe()
        self._kv.forget(self._version)

    def join_group(self, place: GroupPlace, rank: int) -> None:
        self._arrivals.join(place, rank)

    def _checked(self, version: int, function: Callable[..., T], *arguments: Any) -> T:
        try:
            return function(*arguments)
        except ValueError as error:
            raise EngineError(f"engine {self.name!r}: weights version {version}: {error}") from error

    def write_weights(self, manifest: WeightsManifest) -> None:
        self._occupancy.require("reading weights", ("weights",))
        try:
            with torch.inference_mode():
                copy_held(self._parameters, manifest)
        except ValueError as error:
            raise EngineError(f"engine {self.name!r}: {error}") from error

    def sleep(self, tags: Collection[str]) -> None:
        for tag in self._occupancy.to_give(tags, len(self._running) + len(self._waiting)):
            if tag == "kv_cache":
                self._kv.forget(self._version)
                self._cache.give_away()
            else:
                self._parameters = {}
                self._model.give_weights_away()
            self._occupancy.given(tag)
        if self._model.device.type == "cpu":
            give_back_freed()
        else:
            torch.cuda.empty_cache()

    def wake(self, tags: Collection[str]) -> None:
        for tag in self._occupancy.to_take(tags):
            if tag == "kv_cache":
                with torch.inference_mode():
                    self._cache.take_back()
            else:
                self._model.take_weights_back()
                self._parameters = checkpoint_views(self._model.module)
            self._occupancy.taken(tag)

    def memory(self) -> MemoryUse:
        weights = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self._parameters.values()}
        held = {"weights": sum(weights.values()), "kv_cache": self._cache.nbytes}
        return of_process(held) if self._model.device.type == "cpu" else MemoryUse(held)

    def checksums(self) -> dict[str, str]:
        self._occupancy.require("a checksum", ("weights",))
        return {name: checksum(tensor) for name, tensor in self._parameters.items()}

    def score(self, sequences: Sequences[Sequences[int]]) -> list[np.ndarray]:
        check_between(self.name, self._update)
        self._occupancy.require("scoring")
        start = time.perf_counter()
        scores: list[np.ndarray] = []
        batch: list[Sequences[int]] = []
        with torch.inference_mode():
            for index, sequence in enumerate(sequences):
                if fault := fault_of(sequence, self._model.vocab_size):
                    raise EngineError(f"engine {self.name!r}: sequence {index} to score {fault}")
                if batch and sum(map(len, batch)) + len(sequence) > SCORED_TOKENS_PER_PASS:
                    scores.extend(self._score(batch))
                    batch = []
                batch.append(sequence)
            if batch:
                scores.extend(self._score(batch))
        self._busy_seconds += time.perf_counter() - start
        return scores

    def _score(self, sequences: list[Sequences[int]]) -> list[np.ndarray]:
        log_probs = torch.log_softmax(self._model.all_logits(sequences).float(), dim=-1)
        following = torch.tensor([t for tokens in sequences for t in (*tokens[1:], 0)], device=log_probs.device)
        chosen = log_probs.gather(1, following[:, None]).squeeze(1).cpu().numpy()
        scores, end = [], 0
        for tokens in sequences:
            scores.append(np.concatenate([np.zeros(1, np.float32), chosen[end : end + len(tokens) - 1]]))
            end += len(tokens)
        return scores

    def statistics(self) -> EngineStatistics:
        speculation = self._speculation
        return EngineStatistics(
            version=self._version,
            running=len(self._running),
            waiting=len(self._waiting),
            cached_requests=len(self._kv),
            generated_tokens=self._generated,
            prefilled_tokens=self._prefilled,
            cached_tokens=self._cached,
            decode_steps=self._steps,
            busy_seconds=self._busy_seconds,
            kv_tokens=self._slots * self._max_context,
            kv=self._kv.counters(),
            drafts=speculation.drafts if speculation else 0,
            drafted_tokens=speculation.drafted if speculation else 0,
            accepted_tokens=speculation.accepted if speculation else 0,
        )

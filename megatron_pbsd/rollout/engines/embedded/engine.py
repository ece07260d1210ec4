"""The embedded engine: continuous batching over KV slots, in the caller's process and thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence as Sequences
from typing import TYPE_CHECKING

import numpy as np
import torch

from megatron_pbsd.resharding.manifest import WeightsManifest, checksum
from megatron_pbsd.rollout.drafting.verification import agreeing
from megatron_pbsd.rollout.engines.embedded.attention import padded_keys
from megatron_pbsd.rollout.engines.embedded.kv_cache import SlotCache
from megatron_pbsd.rollout.engines.embedded.kv_pool import PoolPlace
from megatron_pbsd.rollout.engines.embedded.kv_store import KVStore
from megatron_pbsd.rollout.engines.embedded.model import PackedModel
from megatron_pbsd.rollout.engines.embedded.sampling import sample, uniforms
from megatron_pbsd.rollout.engines.embedded.sequence import Sequence
from megatron_pbsd.rollout.engines.embedded.weights import checkpoint_views, copy_held, copy_published
from megatron_pbsd.rollout.engines.protocol import (
    Chunk,
    ChunkResult,
    EngineError,
    EngineStatistics,
    fault_of,
    fault_of_chunk,
)
from megatron_pbsd.trajectory import FinishReason

if TYPE_CHECKING:  # which needs numba; an engine that does not speculate does not
    from megatron_pbsd.rollout.engines.embedded.speculation import Speculation

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
            self._cache = SlotCache(slots, padded_keys(max_context))
            self._model.warm_up(self._cache)
        except (OSError, ValueError, NotImplementedError) as error:
            raise EngineError(f"engine {name!r}: cannot load {model_path!r}: {error}") from error
        self._waiting: dict[str, Sequence] = {}
        self._running: dict[str, Sequence] = {}
        self._kv = KVStore(self._cache, slots, kv_pool, name, self._running)
        self._speculation = speculation
        self._ended: list[ChunkResult] = []
        self._interrupted = threading.Event()
        self._version = 0
        self._generated = self._prefilled = self._cached = self._steps = 0
        self._busy_seconds = 0.0

    def submit(self, chunks: Sequences[Chunk]) -> None:
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
        rows = [(s, i) for s in running for i in range(1 + len(s.draft))]
        keys = np.array([s.key for s, _ in rows], dtype=np.uint64)
        positions = np.array([len(s.tokens) + i for s, i in rows], dtype=np.uint64)
        temperatures = np.array([s.chunk.temperature for s, _ in rows])
        try:
            tokens, log_probs = sample(logits, temperatures, uniforms(keys, positions))
        except FloatingPointError as error:
            names = list(dict.fromkeys(rows[row][0].request_id for row in error.args[0]))
            raise EngineError(f"engine {self.name!r}: logits are not finite for requests {names}") from error
        self._take(running, tokens, log_probs)
        self._steps += 1

    def _take(self, running: list[Sequence], tokens: list[int], log_probs: list[float]) -> None:
        """tokens, log_probs: sampled after each sequence and each token of its draft, end to end."""
        drafted, kept, start = [len(s.draft) for s in running], [], 0
        for sequence, count in zip(running, drafted):
            end = start + 1 + count
            kept.append(agreeing(sequence.draft, tokens[start:end]))
            self._append(sequence, tokens[start : start + kept[-1] + 1], log_probs[start:end])
            start = end
        if self._speculation is not None:
            self._speculation.verified(drafted, kept)

    def _append(self, sequence: Sequence, tokens: list[int], log_probs: list[float]) -> None:
        sequence.draft = ()
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
        try:
            with torch.inference_mode():
                copy_published(manifest, self._parameters)
                self._cache.wipe()
        except ValueError as error:
            raise EngineError(f"engine {self.name!r}: weights version {version}: {error}") from error
        self._version = version
        self._kv.forget(version)

    def write_weights(self, manifest: WeightsManifest) -> None:
        try:
            with torch.inference_mode():
                copy_held(self._parameters, manifest)
        except ValueError as error:
            raise EngineError(f"engine {self.name!r}: {error}") from error

    def checksums(self) -> dict[str, str]:
        return {name: checksum(tensor) for name, tensor in self._parameters.items()}

    def score(self, sequences: Sequences[Sequences[int]]) -> list[np.ndarray]:
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

"""An engine that is an SGLang server: a process of its own, which this one starts, watches and speaks HTTP with."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence as Sequences
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import count
from math import ceil
from pathlib import Path
from queue import SimpleQueue
from threading import Event

import numpy as np

from megatron_pbsd.models import family
from megatron_pbsd.models.sglang import ServerParallel, server_of
from megatron_pbsd.platform.process_group import GroupPlace
from megatron_pbsd.platform.usage import MemoryUse, of_process
from megatron_pbsd.resharding.arrival import Arriving, names_of
from megatron_pbsd.resharding.manifest import WeightsManifest, layout
from megatron_pbsd.resharding.shared_memory import attach
from megatron_pbsd.resharding.stream import Described
from megatron_pbsd.rollout.engines.occupancy import Occupancy
from megatron_pbsd.rollout.engines.protocol import (
    Chunk,
    ChunkResult,
    EngineError,
    EngineStatistics,
    KVCounters,
    fault_of,
    fault_of_chunk,
)
from megatron_pbsd.rollout.engines.sglang.arguments import DRAFTING
from megatron_pbsd.rollout.engines.sglang.client import Refused, Unreachable
from megatron_pbsd.rollout.engines.sglang.processes import Launch
from megatron_pbsd.rollout.engines.sglang.replicas import replica_for
from megatron_pbsd.rollout.engines.sglang.replies import (
    Reply,
    StaleWeights,
    WeightsName,
    experts_of,
    generate_body,
    metric,
    read_reply,
    read_scores,
    score_body,
)
from megatron_pbsd.rollout.engines.sglang.server import Server
from megatron_pbsd.rollout.engines.sglang.weights import ServerWeights
from megatron_pbsd.rollout.engines.update import Update, check_between
from megatron_pbsd.trajectory import FinishReason, VersionSpan

ABORT_AGAIN_S = 0.2
IDLE_S = 30.0
MOST_REQUESTS = 1024
"""That a server which orders them is given at a time."""


class SGLangEngine:
    """See `protocol.Engine`. A chunk is one /generate request that a thread waits for.

    launch: how the server is started; its arguments are complete (`arguments.server_arguments`).
    slots: chunks that it runs at a time; a server that has replicas of attention has an equal part of them for each.
    has_weights: whether the server starts with those of `model_path`; until it is given some it otherwise refuses work.
    """

    def __init__(
        self, model_path: str, *, name: str, launch: Launch, slots: int, max_context: int, has_weights: bool = True,
    ) -> None:
        self.name = name
        self._slots, self._max_context = slots, max_context
        self._drafting = DRAFTING.items() <= launch.arguments.items()
        self._prioritises = bool(launch.arguments.get("enable_priority_scheduling"))
        self._parallel = server_of(launch.arguments)
        hf = json.loads((Path(model_path) / "config.json").read_text(encoding="utf-8"))
        self._vocabulary, self._layers = hf["vocab_size"], hf["num_hidden_layers"]
        found = family(hf)
        tensors = found.hf_tensors(hf)
        self._moe_layers = moe_layers(tensors)
        self._on_cpu = launch.arguments.get("device") == "cpu"
        self._server = Server(name, launch)
        try:
            self._weights = ServerWeights(self._server, found.decoder(hf), self._parallel, tensors)
        except (ValueError, Refused) as error:
            self._server.close()
            raise EngineError(
                f"engine {name!r}: SGLang's model is another than that of {model_path!r}: {error}") from error
        self._occupancy = Occupancy(name, has_weights)
        self._update: Update | None = None
        # Each replica has as much.
        self._kv_tokens = self._parallel.dp_attention * json.loads(
            self._server.get("/server_info"))["max_total_num_tokens"]
        # A server that orders requests has to have them all.
        self._threads = ThreadPoolExecutor(MOST_REQUESTS if self._prioritises else slots, thread_name_prefix=name)
        self._flights: dict[Future[Reply], Flight] = {}
        # Of replies, in the order in which they arrive; None only wakes who waits.
        self._arrived: SimpleQueue[Future[Reply] | None] = SimpleQueue()
        self._interrupted = Event()
        self._ended: list[ChunkResult] = []
        self._seen: dict[str, Seen] = {}
        self._numbers = count()
        self._generated = self._prefilled = self._own = self._others = 0
        self._drafts = self._drafted = self._accepted = 0
        self._busy_seconds = 0.0

    def submit(self, chunks: Sequences[Chunk]) -> None:
        check_between(self.name, self._update)
        if chunks:
            self._occupancy.require("generation")
        arriving: list[str] = []
        for chunk in chunks:
            self._check(chunk, arriving)
            arriving.append(chunk.request_id)
        for chunk in chunks:
            self._send(Flight(chunk, [self._server.weights], self._experts_from(chunk)))

    def _check(self, chunk: Chunk, arriving: Sequences[str]) -> None:
        fault = fault_of_chunk(chunk, self._vocabulary, self._max_context)
        if chunk.request_id in arriving or any(f.chunk.request_id == chunk.request_id for f in self._flights.values()):
            fault = "is already running"
        if fault:
            raise EngineError(f"engine {self.name!r}: request {chunk.request_id!r} {fault}")

    def _experts_from(self, chunk: Chunk) -> int | None:
        """Under other weights than its last chunk a context is read again, all of it."""
        if chunk.routed_from is None or not self._moe_layers:
            return None
        seen = self._seen.get(chunk.request_id)
        return chunk.routed_from if seen is None or seen.version == self._server.weights.version else 0

    def _replica(self, request_id: str) -> int | None:
        if self._parallel.dp_attention == 1:
            return None
        seen = self._seen.get(request_id)
        running = Counter(flight.replica for flight in self._flights.values())
        return replica_for([running[replica] for replica in range(self._parallel.dp_attention)],
                           ceil(self._slots / self._parallel.dp_attention), None if seen is None else seen.replica)

    def _send(self, flight: Flight) -> None:
        chunk = flight.chunk
        room = min(chunk.max_new_tokens, self._max_context - len(chunk.tokens))
        flight.rid = f"{chunk.request_id}#{next(self._numbers)}"
        flight.replica = self._replica(chunk.request_id)
        body = generate_body(chunk, flight.tokens, flight.rid, room, flight.experts_from, self._drafting,
                             self._prioritises, flight.replica)
        future = self._threads.submit(self._server.client.post, "/generate", body)
        self._flights[future] = flight
        future.add_done_callback(self._arrived.put)

    def collect(self) -> list[ChunkResult]:
        check_between(self.name, self._update)
        start = time.perf_counter()
        while not self._ended and self._flights and not self._interrupted.is_set():
            self._land(self._arrived.get())
        while not self._arrived.empty():
            self._land(self._arrived.get())
        self._busy_seconds += time.perf_counter() - start
        ended, self._ended = self._ended, []
        return ended

    def interrupt(self) -> None:
        """Let `collect`, the one that runs or the next, return as soon as it can, until `abort` is called. This alone
        may be called from another thread."""
        self._interrupted.set()
        self._arrived.put(None)

    def _land(self, future: Future | None) -> None:
        flight = self._flights.pop(future, None)
        if flight is None:  # only woken, or ended by `abort`
            return
        try:
            reply = read_reply(future.result(), flight.weights)
        except Unreachable as error:
            raise self._server.lost(error) from error
        except StaleWeights as error:
            raise self._server.condemned(f"request {flight.rid!r}: it generated with {error}") from error
        except (Refused, ValueError) as error:
            raise EngineError(f"engine {self.name!r}: request {flight.rid!r}: {error}") from error
        self._take(flight, reply)

    def _take(self, flight: Flight, reply: Reply) -> None:
        chunk = flight.chunk
        self._count(flight, reply)
        flight.add(reply)
        full = len(flight.tokens) >= min(chunk.max_new_tokens, self._max_context - len(chunk.tokens))
        unasked = reply.finish_reason == "stop" and reply.stopped not in chunk.stop_token_ids
        if unasked and not full and not flight.aborted:
            # The server also stops after what the model's configuration names; a chunk stops where it says.
            return self._send(flight)
        reason: FinishReason = "abort" if unasked and not full else "length" if unasked else reply.finish_reason
        version = reply.versions[-1].version if reply.versions else self._server.weights.version
        self._seen[chunk.request_id] = Seen(version, flight.replica)
        self._ended.append(flight.result(reason, *self._routed(flight, reply)))

    def _count(self, flight: Flight, reply: Reply) -> None:
        self._generated += len(reply.tokens)
        context = len(flight.chunk.tokens) + len(flight.tokens)
        self._prefilled += context - reply.cached_tokens if reply.tokens else 0
        self._drafts += reply.drafts
        self._drafted += reply.drafted_tokens
        self._accepted += reply.accepted_tokens
        if flight.chunk.request_id in self._seen:
            self._own += reply.cached_tokens
        else:
            self._others += reply.cached_tokens

    def _routed(self, flight: Flight, reply: Reply) -> tuple[np.ndarray | None, int]:
        if flight.experts_from is None or reply.routed_experts is None or not reply.tokens:
            return None, 0
        end = len(flight.chunk.tokens) + len(flight.tokens) - 1
        start = min(flight.experts_from, end)
        try:
            return experts_of(reply.routed_experts, end - start, self._layers, self._moe_layers), start
        except ValueError as error:
            raise EngineError(f"engine {self.name!r}: request {flight.rid!r}: {error}") from error

    def abort(self, request_ids: Sequences[str]) -> None:
        self._interrupted.clear()
        for future, flight in list(self._flights.items()):
            if flight.chunk.request_id not in request_ids:
                continue
            flight.aborted = True
            if future.cancel():
                del self._flights[future]
                self._ended.append(flight.result("abort"))
                continue
            # The server knows exact ids, and none that has not reached it yet.
            while not future.done():
                self._server.post("/abort_request", {"rid": flight.rid})
                wait([future], ABORT_AGAIN_S)
            self._land(future)

    def release(self, request_ids: Sequences[str]) -> None:
        """The server's own cache gives up the longest untouched."""
        for request_id in request_ids:
            self._seen.pop(request_id, None)

    def hand_over(self, request_ids: Sequences[str]) -> None:
        self.release(request_ids)

    def update_weights(self, manifest: WeightsManifest, version: int) -> None:
        """Chunks that run continue under the new weights; their context is prefilled again."""
        self._checked(version, attach, manifest)
        self.begin_update(manifest.described, version)
        self.load(manifest)
        self.end_update()

    def begin_update(self, tensors: Described, version: int, base: int | None = None) -> None:
        self._occupancy.require_memory(f"weights version {version}")
        held = None if self._update or not self._occupancy.has_weights else self._server.weights.version
        update = Update.begun(self.name, tensors, version, base, held)
        self._checked(version, self._weights.check, tensors)
        self._update = update
        self._weights.begin(busy=bool(self._flights))

    def load(self, bucket: Arriving) -> None:
        self._checked(self._update.version, self._weights.load, bucket)
        self._update.arrived(names_of(bucket))

    def end_update(self) -> None:
        self._weights.end(self._update.ended())
        self._update, self._occupancy.has_weights = None, True
        for flight in self._flights.values():
            flight.weights.append(self._server.weights)

    def join_group(self, place: GroupPlace, rank: int) -> ServerParallel | None:
        self._checked(None, self._weights.join, place, rank)
        return self._weights.divided

    def _checked(self, version: int | None, function: Callable[..., object], *arguments: object) -> None:
        try:
            function(*arguments)
        except (ValueError, Refused) as error:
            of = "" if version is None else f"weights version {version}: "
            raise EngineError(f"engine {self.name!r}: {of}{error}") from error

    def write_weights(self, manifest: WeightsManifest) -> None:
        self._occupancy.require("reading weights", ("weights",))
        self._checked(None, lambda: self._weights.read(manifest, busy=bool(self._flights)))

    def checksums(self) -> dict[str, str]:
        self._occupancy.require("a checksum", ("weights",))
        try:
            return self._weights.checksums(busy=bool(self._flights))
        except (ValueError, Refused) as error:
            raise EngineError(f"engine {self.name!r}: {error}") from error

    def sleep(self, tags: Collection[str]) -> None:
        """A server that is not idle, or is asked twice, dies of it. On a CPU it does nothing."""
        if new := self._occupancy.to_give(tags, len(self._flights)):
            try:
                # The last replies may have left before the server was done with them.
                self._server.get(f"/flush_cache?timeout={IDLE_S:g}")
                self._server.post("/release_memory_occupation", {"tags": new})
            except Refused as error:
                raise EngineError(f"engine {self.name!r} cannot sleep: {error}") from error
            for tag in new:
                self._occupancy.given(tag)
            self._seen.clear()

    def wake(self, tags: Collection[str]) -> None:
        if asleep := self._occupancy.to_take(tags):
            try:
                self._server.post("/resume_memory_occupation", {"tags": asleep})
            except Refused as error:
                raise EngineError(f"engine {self.name!r} cannot wake: {error}") from error
            for tag in asleep:
                self._occupancy.taken(tag)

    def memory(self) -> MemoryUse:
        """On a CPU nothing sleeps."""
        kv_gib = metric(self._server.get("/metrics"), "sglang:kv_cache_memory_usage_gb", tp_rank="0", pp_rank="0")
        sizes = {"kv_cache": round(kv_gib * 2**30), "weights": layout("", self._weights.tensors).nbytes}
        if self._on_cpu:
            return of_process(sizes)
        return MemoryUse({tag: size for tag, size in sizes.items() if tag not in self._occupancy.asleep})

    def score(self, sequences: Sequences[Sequences[int]]) -> list[np.ndarray]:
        check_between(self.name, self._update)
        self._occupancy.require("scoring")
        start = time.perf_counter()
        for index, sequence in enumerate(sequences):
            if fault := fault_of(sequence, self._vocabulary):
                raise EngineError(f"engine {self.name!r}: sequence {index} to score {fault}")
        try:
            replies = self._server.post("/generate", score_body(sequences, f"score#{next(self._numbers)}"))
            scores = read_scores(replies, self._server.weights)
        except Refused as error:
            raise EngineError(f"engine {self.name!r}: sequences to score: {error}") from error
        except StaleWeights as error:
            raise self._server.condemned(f"it scored with {error}") from error
        self._busy_seconds += time.perf_counter() - start
        return scores

    def statistics(self) -> EngineStatistics:
        passes = metric(self._server.get("/metrics"), "sglang:cuda_graph_passes_total", tp_rank="0", pp_rank="0")
        return EngineStatistics(
            version=self._server.weights.version,
            running=min(len(self._flights), self._slots),
            waiting=max(0, len(self._flights) - self._slots),
            cached_requests=len(self._seen),
            generated_tokens=self._generated,
            prefilled_tokens=self._prefilled,
            cached_tokens=self._own + self._others,
            decode_steps=int(passes),
            busy_seconds=self._busy_seconds,
            kv_tokens=self._kv_tokens,
            kv=KVCounters(slot_tokens=self._own, sibling_tokens=self._others),
            drafts=self._drafts,
            drafted_tokens=self._drafted,
            accepted_tokens=self._accepted,
        )

    def close(self) -> None:
        """Ends the server; an engine whose process ends need not."""
        self._server.close()
        self._threads.shutdown(wait=False)


@dataclass(frozen=True)
class Seen:
    """Of a request's last chunk: the weights of its last token, and the replica of attention that has its KV."""

    version: int
    replica: int | None


@dataclass
class Flight:
    """A chunk under way. weights: those that the server was given since. tokens … versions: of replies so far."""

    chunk: Chunk
    weights: list[WeightsName]
    experts_from: int | None
    rid: str = ""
    replica: int | None = None
    aborted: bool = False
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    versions: list[VersionSpan] = field(default_factory=list)
    cached_tokens: int | None = None

    def result(self, reason: FinishReason, experts: np.ndarray | None = None, routed_from: int = 0) -> ChunkResult:
        return ChunkResult(self.chunk.request_id, tuple(self.tokens), tuple(self.log_probs), reason,
                           self.cached_tokens or 0, tuple(self.versions), experts, routed_from)

    def add(self, reply: Reply) -> None:
        offset = len(self.tokens)
        self.tokens += reply.tokens
        self.log_probs += reply.log_probs
        for span in reply.versions:
            start, end = span.start + offset, span.end + offset
            if self.versions and self.versions[-1].version == span.version:
                start = self.versions.pop().start
            self.versions.append(VersionSpan(span.version, start, end))
        if self.cached_tokens is None:
            self.cached_tokens = reply.cached_tokens


def moe_layers(tensors: Sequences[str]) -> list[int]:
    """Layers with experts, by the names of a checkpoint's tensors."""
    return sorted({int(name.split("layers.")[1].split(".")[0]) for name in tensors if ".experts." in name})

"""The processes of the bench `reshard`: two learner ranks, an engine, and one that only copies memory."""

from __future__ import annotations

import multiprocessing
import time
import zlib
from collections.abc import Callable, Sequence
from math import prod
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_pbsd.config import ParallelConfig
from megatron_pbsd.models import family
from megatron_pbsd.models.decoder import Decoder, hf_tensors
from megatron_pbsd.models.mapping import pieces
from megatron_pbsd.models.parameters import coordinates, local_shape
from megatron_pbsd.resharding.arrival import Arrivals
from megatron_pbsd.resharding.manifest import WeightsManifest
from megatron_pbsd.resharding.stream import SLOTS, Bucket, Buckets, Parts, overlapped, plan_for

PARALLEL = ParallelConfig(world_size=2, tp=2, ep=2)
COPIED_BYTES = 256 << 20


class Took(NamedTuple):
    seconds: float
    processor_s: float


class Publication:
    """Owns processes and shared memory while it is entered."""

    def __init__(self, config: dict[str, Any], bucket_bytes: int):
        decoder = family(config).decoder(config)
        tensors = {name: ("float32", shape) for name, shape in hf_tensors(decoder).items()}
        self._buckets = Buckets(plan_for(decoder, PARALLEL, tensors, bucket_bytes))
        buckets = self._buckets.buckets
        self.count, self.bucket_bytes = len(buckets), self._buckets.nbytes
        self.nbytes = sum(bucket.nbytes for bucket in buckets)
        self._ranks = [_Worker(_Rank, config, buckets, rank) for rank in range(PARALLEL.world_size)]
        self._engine = _Worker(_Engine, config, [bucket.manifest for bucket in buckets])
        self._copier = _Worker(_Copier)

    def __enter__(self) -> Publication:
        for worker in self._workers:
            worker.start("watch_memory")()
        return self

    def __exit__(self, *exception: object) -> None:
        for worker in self._workers:
            worker.close()
        self._buckets.close()

    def publish(self) -> Took:
        """processor_s: of the side that has more to do, all ranks or the engine."""
        def gather(number: int) -> Callable[[], object]:
            waits = [rank.start("gather", number) for rank in self._ranks]
            return lambda: [wait() for wait in waits]

        before = self._processor_s()
        started = time.perf_counter()
        overlapped(self.count, gather, lambda number: self._engine.start("load", number))
        seconds = time.perf_counter() - started
        *ranks, engine = (after - at for after, at in zip(self._processor_s(), before, strict=True))
        return Took(seconds, max(sum(ranks), engine))

    def memcpy(self) -> Took:
        """Of as many bytes as are published."""
        return Took(*(seconds * self.nbytes for seconds in self._copier.start("copy")()))

    def _processor_s(self) -> list[float]:
        return [worker.start("processor_s")() for worker in (*self._ranks, self._engine)]

    def check(self) -> None:
        """RuntimeError naming tensors of the engine that are not the learner's."""
        if wrong := self._engine.start("wrong")():
            raise RuntimeError(f"published other bytes than the learner has, in {wrong}")

    def extra_bytes(self) -> int:
        """Peak memory beyond what the processes had before: the segment, once, and what belongs to one of them."""
        return SLOTS * self.bucket_bytes + sum(
            worker.start("private_growth")() for worker in (*self._ranks, self._engine))

    @property
    def _workers(self) -> list[_Worker]:
        return [*self._ranks, self._engine, self._copier]


class _Worker:
    """An object in a process of its own."""

    def __init__(self, factory: Callable[..., Any], *arguments: Any):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, factory, arguments), daemon=True)
        self._process.start()
        theirs.close()

    def start(self, method: str, *arguments: Any) -> Callable[[], Any]:
        """Begin with a call; what is returned waits for its result."""
        self._pipe.send((method, arguments))
        return self._pipe.recv

    def close(self) -> None:
        self._pipe.close()
        self._process.join(10)
        self._process.kill()


def _serve(pipe: Connection, factory: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    component = factory(*arguments)
    while True:
        try:
            method, given = pipe.recv()
        except EOFError:
            return
        pipe.send(getattr(component, method)(*given))


class _Watched:
    """Knows how much memory its process has taken since `watch_memory`, shared memory left out."""

    _before = 0

    def watch_memory(self) -> None:
        torch.zeros(8, 8)[:, :4].copy_(torch.ones(8, 4))  # brings in the library's code, which is no copy of a model
        Path("/proc/self/clear_refs").write_text("5")  # the maximum is forgotten
        self._before = _status("VmRSS") - _status("RssShmem")

    def processor_s(self) -> float:
        return time.process_time()

    def private_growth(self) -> int:
        """Shared memory is taken to have been mapped whole at the peak, as it is at the end."""
        return max(_status("VmHWM") - _status("RssShmem") - self._before, 0)


class _Rank(_Watched):
    def __init__(self, config: dict[str, Any], buckets: Sequence[Bucket], rank: int):
        decoder = family(config).decoder(config)
        parameters = {}
        for name, parts in pieces(decoder, PARALLEL, coordinates(PARALLEL, rank), 0).items():
            tensor = parameters[0, name] = torch.zeros(local_shape(parts))
            for piece in parts:
                tensor[piece.local_index] = _value(decoder, piece.hf_name)[piece.hf_index]
        self._parts = Parts(buckets, rank, parameters)

    def gather(self, number: int) -> None:
        self._parts.gather(number)


class _Engine(_Watched):
    def __init__(self, config: dict[str, Any], manifests: Sequence[WeightsManifest]):
        self._decoder = family(config).decoder(config)
        self._parameters = {name: torch.full(shape, torch.nan) for name, shape in hf_tensors(self._decoder).items()}
        self._manifests, self._arrivals = manifests, Arrivals(torch.device("cpu"))

    def load(self, number: int) -> None:
        for name, tensor in self._arrivals.tensors(self._manifests[number]).items():
            self._parameters[name].copy_(tensor)

    def wrong(self) -> list[str]:
        return [name for name, tensor in self._parameters.items()
                if not torch.equal(tensor.view(torch.int32), _value(self._decoder, name).view(torch.int32))]


class _Copier(_Watched):
    def __init__(self) -> None:
        self._source = torch.ones(COPIED_BYTES, dtype=torch.uint8)
        self._target = torch.zeros_like(self._source)

    def copy(self, times: int = 4) -> Took:
        """For each byte that one thread copies between two blocks of memory, which no cache holds."""
        started, working = time.perf_counter(), time.process_time()
        for _ in range(times):
            self._target.copy_(self._source)
        took = time.perf_counter() - started, time.process_time() - working
        return Took(*(seconds / (times * COPIED_BYTES) for seconds in took))


def _value(decoder: Decoder, name: str) -> torch.Tensor:
    """A tensor whose elements differ from each other, and from those of others at their place."""
    shape = hf_tensors(decoder)[name]
    return torch.arange(prod(shape), dtype=torch.float32).add_(zlib.crc32(name.encode()) % 65521).view(shape)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))

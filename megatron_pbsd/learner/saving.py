"""Writes a rank's part of a checkpoint while the rank goes on.

A thread copies the tensors to host memory, and then writes the copies. The copy is over before the tensors change: who
changes them waits for it, which is at the end of the next forward and backward pass, if at all.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_pbsd.checkpointing.torch_dist import Writer, report_failure, write_common
from megatron_pbsd.learner.errors import LearnerError

PIECE_BYTES = 1 << 28
"""Host memory is asked for in pieces: torch rounds each pinned allocation up to a power of two."""
ALIGNMENT = 64


@dataclass(frozen=True)
class Part:
    """`values` are written as stored[offset : offset + sizes], with `stored` the checkpoint's tensor `key`."""

    key: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    values: torch.Tensor


@dataclass(frozen=True)
class Content:
    """What one writer writes. common: what is the same on all ranks, if it is this one that writes it."""

    parts: Sequence[Part]
    objects: Mapping[str, Any]
    common: Mapping[str, Any] | None


@dataclass
class _Job:
    """ready, done: of the tensors on a GPU, for streams: their values are there; they have been copied.
    copied: the same on the host; for a GPU all copies are in its stream then."""

    folder: Path
    content: Content
    ready: torch.cuda.Event | None = None
    done: torch.cuda.Event | None = None
    copied: threading.Event = field(default_factory=threading.Event)
    thread: threading.Thread | None = None
    failure: Exception | None = None


class Saver:
    """name: of the writer (`torch_dist.writer_name`). device: where the tensors are.

    Failures of the thread are raised by whichever method is called next.
    """

    def __init__(self, name: str, device: torch.device):
        self._name, self._device = name, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._copies: list[torch.Tensor] = []
        self._job: _Job | None = None
        self.waited_s = 0.0
        """Seconds that `copied` has waited since the last save began."""

    def begin(self, folder: Path, content: Content) -> None:
        """Start writing into `folder`; what an earlier call began is waited for."""
        self.saved()
        folder.mkdir(parents=True, exist_ok=True)
        self.waited_s = 0.0
        job = self._job = _Job(folder, content)
        if self._stream is not None:
            job.ready, job.done = torch.cuda.Event(), torch.cuda.Event()
            job.ready.record()
        job.thread = threading.Thread(target=self._run, args=(job,), name=f"save {self._name}", daemon=True)
        job.thread.start()

    def copied(self) -> None:
        """To be called before the tensors change: wait until they have been copied."""
        if self._job is not None:
            began = time.perf_counter()
            self._job.copied.wait()
            if self._job.done is not None and self._job.failure is None:
                torch.cuda.current_stream().wait_event(self._job.done)
            self.waited_s += time.perf_counter() - began
        self.check()

    def saved(self) -> None:
        """Wait until all is on disk."""
        if self._job is not None:
            self._job.thread.join()
        self.check()
        self._job = None

    def check(self) -> None:
        """LearnerError if writing has failed, once."""
        if self._job is not None and self._job.failure is not None:
            job, self._job = self._job, None
            raise LearnerError(f"saving {self._name} into {job.folder} failed: {job.failure}") from job.failure

    def _run(self, job: _Job) -> None:
        try:
            self._copy(job)
            writer = Writer(job.folder, self._name)
            for part, copy in zip(job.content.parts, self._copies, strict=True):
                writer.tensor(part.key, part.shape, part.offset, copy)
            for key, value in job.content.objects.items():
                writer.object(key, value)
            if job.content.common is not None:
                write_common(job.folder, job.content.common)
            writer.close()
        except Exception as error:
            job.failure = error
            report_failure(job.folder, self._name, f"{type(error).__name__}: {error}")
        finally:
            job.copied.set()

    def _copy(self, job: _Job) -> None:
        sources = [part.values for part in job.content.parts]
        if [(s.shape, s.dtype) for s in sources] != [(c.shape, c.dtype) for c in self._copies]:
            self._copies = _empty_like(sources, pinned=self._stream is not None)
        if self._stream is None:
            for source, copy in zip(sources, self._copies, strict=True):
                copy.copy_(source)
            job.copied.set()
            return
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            self._stream.wait_event(job.ready)
            for source, copy in zip(sources, self._copies, strict=True):
                copy.copy_(source, non_blocking=True)
            job.done.record(self._stream)
        job.copied.set()
        job.done.synchronize()


def _empty_like(sources: Sequence[torch.Tensor], pinned: bool) -> list[torch.Tensor]:
    """Host tensors of these shapes and dtypes. Each is a storage of its own, which is what is written with a tensor,
    although many share an allocation."""
    sizes = [-(-source.nbytes // ALIGNMENT) * ALIGNMENT for source in sources]
    left, used = sum(sizes), 0
    made, piece = [], torch.empty(0, dtype=torch.uint8)
    for source, size in zip(sources, sizes, strict=True):
        if used + size > len(piece):
            piece, used = torch.empty(max(size, min(PIECE_BYTES, left)), dtype=torch.uint8, pin_memory=pinned), 0
        made.append(torch.frombuffer(
            piece.numpy(), dtype=source.dtype, count=source.numel(), offset=used).view(source.shape))
        left, used = left - size, used + size
    return made

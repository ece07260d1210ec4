"""Files of checkpoints: written once from beginning to end, mapped to be read, synced to disk."""

from __future__ import annotations

import ctypes
import io
import mmap
import os
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
import xxhash

NO_RESERVE = 0x4000
"""Linux' MAP_NORESERVE, which `mmap` does not name: a private mapping may be larger than the memory."""

SYNC_FILE_RANGE_WRITE = 2
"""Linux' flag: begin to write these bytes to disk, and return."""
AHEAD = 32 << 20
"""Bytes."""
PIECE = 256 << 10
"""Bytes that are written at a time: what is hashed is still in the processor's cache, and the page cache finds room for
it more easily than for more at once. They begin at multiples of it: others the page cache keeps in smaller units."""


class HashedFile(io.RawIOBase):
    """A new file that is written from its beginning to its end; or a part of one that others write too, from byte
    `start` on."""

    def __init__(self, path: Path, start: int | None = None):
        super().__init__()
        flags = os.O_WRONLY | os.O_CREAT | (os.O_EXCL if start is None else 0)
        self._file, self._hash = os.fdopen(os.open(path, flags, 0o666), "wb", buffering=PIECE), xxhash.xxh3_128()
        self._at = self._begun = start or 0
        self._file.seek(self._at)

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        with memoryview(data) as view, view.cast("B") as elements:
            end = self._at + len(elements)
            while self._at < end:
                start = len(elements) - (end - self._at)
                with elements[start : start + PIECE - self._at % PIECE] as piece:
                    self._hash.update(piece)
                    self._at += self._file.write(piece)
                if self._at - self._begun >= AHEAD:
                    self._begin_to_sync()
            return len(elements)

    def tell(self) -> int:
        return self._at

    def _begin_to_sync(self) -> None:
        """The disk works while more is made; a hint, of which nothing depends."""
        begin = getattr(ctypes.CDLL(None), "sync_file_range", None)
        if begin is not None:
            begin(self._file.fileno(), ctypes.c_int64(self._begun), ctypes.c_int64(self._at - self._begun),
                  ctypes.c_uint(SYNC_FILE_RANGE_WRITE))
        self._begun = self._at

    def close_synced(self) -> str:
        """xxh3_128 of all that was written, in hex."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self.close()
        return self._hash.hexdigest()

    def close(self) -> None:
        self._file.close()
        super().close()


class MappedFile:
    """A file whose pages are read as they are touched. OSError or ValueError when it is missing or empty."""

    def __init__(self, path: Path):
        self._path = path
        with path.open("rb") as opened:
            self.data = mmap.mmap(opened.fileno(), 0, flags=mmap.MAP_PRIVATE | NO_RESERVE,
                                  prot=mmap.PROT_READ | mmap.PROT_WRITE)

    def tensor(self, dtype: torch.dtype, shape: Sequence[int], start: int) -> torch.Tensor:
        """The bytes from `start` on as elements; a view that is not to be written to."""
        count = prod(shape)
        if not count:
            return torch.empty(tuple(shape), dtype=dtype)
        flat = torch.frombuffer(self.data, dtype=torch.uint8, count=count * dtype.itemsize, offset=start)
        if start % dtype.itemsize:
            flat = flat.clone()  # torch reads elements at multiples of their size only
        return flat.view(dtype).view(tuple(shape))

    def release(self) -> None:
        """Give the pages back to the page cache; they come again when they are touched."""
        self.data.madvise(mmap.MADV_DONTNEED)

    def forget(self, start: int, stop: int) -> None:
        """Give the pages back, and let the page cache use those of these bytes that are on disk for something else."""
        self.release()
        with self._path.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), start, stop - start, os.POSIX_FADV_DONTNEED)


def write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """A file, or the entries of a folder, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

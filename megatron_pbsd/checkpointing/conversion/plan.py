"""What a conversion is: sections that are written in any order, each by itself, and checked against what was read."""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import xxhash

from megatron_pbsd.boxes import Box
from megatron_pbsd.checkpointing.errors import CheckpointError
from megatron_pbsd.checkpointing.hf_folder import raw

Item = TypeVar("Item")
PIECE = 64 << 20
"""Bytes of a tensor that are looked at together, where nothing is written."""
RELEASE_EVERY = 32 << 20
"""Bytes that are read before the pages they came from are let go."""


class Conversion(Protocol):
    """A dataclass: every process makes the same sections, files or consecutive parts of them, of what its fields say.

    inner: folder inside the target that they go to; empty for the target itself.
    piece_bytes: of a tensor at most so much is held at a time.
    """

    inner: str
    piece_bytes: int

    def problems(self) -> list[str]:
        """Everything that stands in the way; nothing is written unless this is empty."""

    def identity(self) -> dict[str, Any]:
        """What was asked for, and what the source looked like. Sections of an interrupted conversion of the same
        identity are kept."""

    def sections(self) -> dict[str, int]:
        """Name → about how many bytes, in the order of the model."""

    def write(self, folder: Path, name: str, done: Callable[[int], None]) -> None:
        """Write one, and `digests` beside it. CheckpointError naming file and tensor where the source is damaged."""

    def check(self, folder: Path, name: str, done: Callable[[int], None]) -> list[str]:
        """What in a written section is not as it was read; empty when all is well."""

    def discard(self, folder: Path, name: str) -> None:
        """Remove what was written of a section, or what says that it is there."""

    def finish(self, folder: Path) -> None:
        """All sections are written: make the folder complete."""

    def damage(self) -> list[str]:
        """Everything in the source that is not what was written there, as far as it says; asked after a failure."""


class Digests:
    """xxh3_128 of tensors that come in pieces, each in order."""

    def __init__(self) -> None:
        self._states: dict[str, xxhash.xxh3_128] = {}

    def update(self, name: str, part: torch.Tensor) -> None:
        self._states.setdefault(name, xxhash.xxh3_128()).update(raw(part))

    def hex(self) -> dict[str, str]:
        return {name: state.hexdigest() for name, state in self._states.items()}

    def differing(self, expected: Mapping[str, str]) -> list[str]:
        """Names of which another digest, or none, is expected; `expected` may have more."""
        return [name for name, found in self.hex().items() if expected.get(name) != found]


class Scratch:
    """Memory that is used again and again: fresh pages cost as much as copying into them."""

    def __init__(self) -> None:
        self._buffer: mmap.mmap | None = None

    def tensor(self, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
        """Uninitialised, and valid until the next call."""
        count = prod(shape)
        if not count:
            return torch.empty(tuple(shape), dtype=dtype)
        if self._buffer is None or len(self._buffer) < count * dtype.itemsize:
            self._buffer = mmap.mmap(-1, count * dtype.itemsize)
        return torch.frombuffer(self._buffer, dtype=dtype, count=count).view(tuple(shape))


class Meter:
    """Counts bytes, and lets go of pages now and then."""

    def __init__(self, done: Callable[[int], None], *readers: Any):
        self._done, self._readers, self._since = done, readers, 0

    def __call__(self, nbytes: int) -> None:
        self._done(nbytes)
        self._since += nbytes
        if self._since >= RELEASE_EVERY:
            self._since = 0
            for reader in self._readers:
                reader.release()


def row_steps(rows: int, row_bytes: int, piece_bytes: int) -> Iterable[slice]:
    """Consecutive rows of at most `piece_bytes`, one row at least."""
    step = max(1, piece_bytes // max(row_bytes, 1))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def box_steps(box: Box, itemsize: int, piece_bytes: int) -> Iterable[Box]:
    """Consecutive parts of a box of at most `piece_bytes`, divided along its first dimension that is not of size 1."""
    sizes = [s.stop - s.start for s in box]
    d = next((d for d, size in enumerate(sizes) if size > 1), len(box))
    if d == len(box):
        return [box]
    return ((*box[:d], slice(box[d].start + rows.start, box[d].start + rows.stop), *box[d + 1:])
            for rows in row_steps(sizes[d], prod(sizes[d + 1:]) * itemsize, piece_bytes))


def balanced(items: Sequence[Item], sizes: Sequence[int], limit: int) -> list[list[Item]]:
    """Consecutive items in as few groups as `limit` bytes each allow, of about equal size; larger items are alone."""
    total = sum(sizes)
    groups: list[list[Item]] = [[]]
    goal = total / max(1, -(-total // limit))
    begun = 0
    for item, size in zip(items, sizes, strict=True):
        # An item goes where its middle lies.
        if groups[-1] and (begun + size / 2 > goal * len(groups)):
            groups.append([])
        groups[-1].append(item)
        begun += size
    return groups


def digests_path(folder: Path, name: str) -> Path:
    """Where the digests of a written section wait until the folder is complete."""
    return folder / f"{name}.digests"


def write_digests(folder: Path, name: str, digests: Mapping[str, str]) -> None:
    """Written after the section itself: what they say is compared with it before it is relied on."""
    path = digests_path(folder, name)
    unfinished = path.with_suffix(".new")
    unfinished.write_text(json.dumps(digests))
    unfinished.rename(path)


def read_digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Of all these sections together."""
    found: dict[str, str] = {}
    for name in names:
        found |= json.loads(digests_path(folder, name).read_text())
    return found


def snapshot(folder: Path) -> dict[str, list[int]]:
    """Size and time of each file: whether a source is still the same."""
    return {str(path.relative_to(folder)): [path.stat().st_size, path.stat().st_mtime_ns]
            for path in sorted(folder.rglob("*")) if path.is_file()}


def require(problems: Sequence[str]) -> None:
    """CheckpointError with all of them, each on a line of its own."""
    if problems:
        head = [f"{len(problems)} problems:"] if len(problems) > 1 else []
        raise CheckpointError("\n  ".join([*head, *problems]))

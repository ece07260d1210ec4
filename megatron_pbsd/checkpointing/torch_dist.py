"""Megatron-core's checkpoint format 'torch_dist' (torch.distributed.checkpoint), written and read without collectives.

    .metadata       every tensor's shape, dtype and parts, and where in which file each part lies
    metadata.json   names the format
    common.pt       what is the same on all ranks
    *.distcp        the parts, each as torch.save writes it
    *.json          what is in the file of that name; only until all are there and .metadata has it
    *.failed        why the writer of that name gave up

Any number of processes write files of their own; whoever waits for them writes the index. Parts are arbitrary boxes:
what one layout writes another reads.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import json
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from isal.isal_zlib import crc32

from megatron_pbsd.boxes import Box, intersection, relative
from megatron_pbsd.checkpointing import archive
from megatron_pbsd.checkpointing.errors import CheckpointError, named
from megatron_pbsd.checkpointing.files import HashedFile, MappedFile, write_synced
from megatron_pbsd.checkpointing.torch_dist_index import Entry, Stored, read_index, tiling_problem, write_index

COMMON = "common.pt"
SUFFIX = ".distcp"
STEP = 64 << 20
"""Bytes."""


class Writer:
    """Writes parts into `folder`/`name`.distcp, which no other process writes."""

    def __init__(self, folder: Path, name: str):
        self._folder, self.name, self.file = folder, name, f"{name}{SUFFIX}"
        self.entries: list[Entry] = []
        self._stream = HashedFile(folder / self.file)

    def tensor(self, key: str, shape: Sequence[int], offset: Sequence[int], part: torch.Tensor) -> None:
        """`part` of the tensor `key` of this shape begins at `offset`; leading axes of size 1 may be left out."""
        size = (1,) * (len(shape) - part.dim()) + tuple(part.shape)
        # Elements that begin at multiples of their size are read without a copy.
        self._stream.write(bytes(-self._stream.tell() % archive.ALIGNMENT))
        start = self._stream.tell()
        archive.save(part.detach().cpu().contiguous().view(size), self._stream)
        length = self._stream.tell() - start
        self.entries.append(
            Entry(key, self.file, start, length, tuple(shape), part.dtype, tuple(offset), size))

    def object(self, key: str, value: Any) -> None:
        start = self._stream.tell()
        torch.save(value, self._stream)
        self.entries.append(Entry(key, self.file, start, self._stream.tell() - start))

    def saved_object(self, key: str, saved: bytes | memoryview) -> None:
        """What torch.save has made of an object."""
        start = self._stream.tell()
        self._stream.write(saved)
        self.entries.append(Entry(key, self.file, start, len(saved)))

    def close(self) -> None:
        """Sync to disk, and then say so in a file beside it."""
        checksum = self._stream.close_synced()
        listing = self._folder / f"{self.name}.json"
        unfinished = listing.with_suffix(".json.new")
        unfinished.write_text(json.dumps({"checksum": checksum, "entries": [
            {**vars(e), "dtype": e.dtype and str(e.dtype).removeprefix("torch.")} for e in self.entries]}))
        unfinished.rename(listing)


def writer_name(rank: int) -> str:
    """Of the writer that is this rank; its files are named as Megatron-core names them."""
    return f"__{rank}_0"


def report_failure(folder: Path, name: str, reason: str) -> None:
    """Say that the writer `name` gave up; best effort, as a full disk may hold no reason either."""
    with contextlib.suppress(OSError):
        (folder / f"{name}.failed").write_text(reason)


def failures(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Name → reason of those of the writers of these names that have given up."""
    reasons = {name: folder / f"{name}.failed" for name in names}
    return {name: path.read_text() for name, path in reasons.items() if path.exists()}


def unfinished(folder: Path, names: Iterable[str]) -> list[str]:
    """Those of the writers of these names that have not closed yet."""
    return [name for name in names if not (folder / f"{name}.json").exists()]


def listed(folder: Path, name: str) -> tuple[str, list[Entry]]:
    """What the writer of this name, which has closed, says: xxh3_128 of its file, in hex, and what is in it."""
    listing = json.loads((folder / f"{name}.json").read_text())
    return listing["checksum"], [
        Entry(**e | {"shape": e["shape"] and tuple(e["shape"]), "dtype": e["dtype"] and getattr(torch, e["dtype"]),
                     "offset": tuple(e["offset"]), "size": tuple(e["size"])}) for e in listing["entries"]]


def assemble(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """Make what the writers of these names left in `folder` a checkpoint; file → xxh3_128 of its content, in hex.

    All have closed, and one of them, or the caller, has written `COMMON`.
    """
    said = {name: listed(folder, name) for name in names}
    write_index(folder, (entry for _, entries in said.values() for entry in entries))
    for name in names:
        (folder / f"{name}.json").unlink()
    return {f"{name}{SUFFIX}": checksum for name, (checksum, _) in said.items()}


class Reader:
    """A checkpoint's tensors, read box by box; CheckpointError when it is none, or damaged.

    entries: what is in `folder`, where there is no index yet.
    checked: no element is handed out before its part was compared with the part's checksum.
    """

    def __init__(self, folder: Path, entries: Iterable[Entry] | None = None, checked: bool = False):
        self.folder, self.checked = folder, checked
        self.tensors: dict[str, Stored] = {}
        self.objects: dict[str, Entry] = {}
        self._maps: dict[str, MappedFile] = {}
        self._starts: dict[Entry, int] = {}
        for entry in read_index(folder) if entries is None else entries:
            if entry.shape is None:
                self.objects[entry.key] = entry
            else:
                self.tensors.setdefault(entry.key, Stored(entry.shape, entry.dtype, [])).parts.append(entry)

    def read(self, key: str, box: Box) -> torch.Tensor:
        """The elements of `key` in `box`; a view of the file where one part has them all, not to be written to.

        CheckpointError when they are not all there.
        """
        stored = self._stored(key)
        found, made = 0, None
        for part in stored.parts:
            common = intersection(part.box, box)
            if common is None:
                continue
            values = self.part(part)[relative(common, part.offset)]
            if common == box:
                return values
            if made is None:
                made = torch.empty([s.stop - s.start for s in box], dtype=stored.dtype)
            made[relative(common, [s.start for s in box])] = values
            found += values.numel()
        wanted = prod(s.stop - s.start for s in box)
        if made is None or found != wanted:
            raise CheckpointError(f"{self.folder}: {key} lacks {wanted - found} of {wanted} elements in {box}")
        return made

    def part(self, part: Entry) -> torch.Tensor:
        """A stored part; a view of the file, not to be written to."""
        if part not in self._starts:
            start, length, checksum = self._elements(part)
            size = prod(part.size) * part.dtype.itemsize
            if length != size:
                raise CheckpointError(f"{self.folder / part.file}: {part.key} at {part.offset} has {length} bytes, "
                                      f"{size} are expected of {part.dtype} {part.size}")
            if self.checked and self._crc(part.file, start, length) != checksum:
                raise CheckpointError(f"{self.folder / part.file}: {part.key} at {part.offset} is damaged: its "
                                      "checksum is not that of what was written")
            self._starts[part] = start
        return self._map(part.file).tensor(part.dtype, part.size, self._starts[part])

    def release(self) -> None:
        """Let go of the pages that were read; they come back when they are read again."""
        for mapped in self._maps.values():
            mapped.release()

    def forget(self) -> None:
        """The same, and let the page cache use those that are on disk for something else."""
        for mapped in self._maps.values():
            mapped.forget(0, len(mapped.data))

    def object(self, key: str) -> Any:
        entry = self.objects[key]
        data = self._map(entry.file).data[entry.start : entry.start + entry.length]
        try:
            return torch.load(io.BytesIO(data), weights_only=True)
        except Exception as error:
            raise CheckpointError(f"{self.folder / entry.file}: {key} is damaged: {error}") from error

    def saved_object(self, key: str) -> memoryview:
        """What torch.save made of an object, damaged or not."""
        entry = self.objects[key]
        return memoryview(self._map(entry.file).data)[entry.start : entry.start + entry.length]

    def common(self) -> dict[str, Any]:
        """What is the same on all ranks."""
        try:
            return torch.load(self.folder / COMMON, weights_only=True)
        except Exception as error:
            raise CheckpointError(f"{self.folder / COMMON} is missing or damaged: {error}") from error

    def damaged(self) -> list[str]:
        """A sentence for each file in which parts or objects are not what was written, naming some of them."""
        found: dict[str, list[str]] = {}
        for entry in (*self.objects.values(), *(p for t in self.tensors.values() for p in t.parts)):
            if not self.intact(entry):
                found.setdefault(entry.file, []).append(entry.key + (f" at {entry.offset}" if entry.offset else ""))
        return [f"{self.folder / file}: {named(places)} {'is' if len(places) == 1 else 'are'} damaged"
                if (self.folder / file).is_file() else f"{self.folder / file} is missing, and with it {named(places)}"
                for file, places in found.items()]

    def intact(self, entry: Entry) -> bool:
        """Whether the bytes of a part, or object, are those that were written; torch.save left checksums of them."""
        try:
            saved = archive.Slice(self._map(entry.file).data, entry.start, entry.length)
            with zipfile.ZipFile(saved) as opened:
                for record in opened.infolist():
                    if entry.shape is None or not record.filename.encode().endswith(archive.ELEMENTS):
                        opened.read(record)
            if entry.shape is None:
                return True
            *where, checksum = self._elements(entry)
            return self._crc(entry.file, *where) == checksum
        except Exception:
            return False

    def incomplete(self) -> list[str]:
        """Keys of tensors whose parts do not tile them, each with what is wrong."""
        return [f"{self.folder}: {key} {problem}" for key, tensor in self.tensors.items()
                if (problem := tiling_problem(tensor))]

    def _stored(self, key: str) -> Stored:
        if key not in self.tensors:
            near = difflib.get_close_matches(key, self.tensors, 1)
            raise CheckpointError(f"{self.folder} has no tensor {key}" + (f"; did you mean {near[0]}?" if near else ""))
        return self.tensors[key]

    def _map(self, file: str) -> MappedFile:
        if file not in self._maps:
            path = self.folder / file
            try:
                self._maps[file] = MappedFile(path)
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{path} is missing or empty: {error}") from error
        return self._maps[file]

    def _elements(self, part: Entry) -> archive.Elements:
        try:
            return archive.elements(self._map(part.file).data, part.start, part.length)
        except Exception as error:
            raise CheckpointError(
                f"{self.folder / part.file}: {part.key} at {part.offset} is truncated or damaged: "
                f"{str(error) or repr(error)}") from error

    def _crc(self, file: str, start: int, length: int) -> int:
        """A step at a time, so that few pages are held."""
        mapped, found = self._map(file), 0
        with memoryview(mapped.data) as data:
            for at in range(start, start + length, STEP):
                with data[at : min(at + STEP, start + length)] as values:
                    found = crc32(values, found)
                if length > STEP:
                    mapped.release()
        return found


def write_common(folder: Path, common: Mapping[str, Any]) -> None:
    """What is the same on all ranks: plain values and tensors."""
    data = io.BytesIO()
    torch.save(dict(common), data)
    write_synced(folder / COMMON, data.getvalue())

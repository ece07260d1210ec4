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
import mmap
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_pbsd.checkpointing.errors import CheckpointError

METADATA = ".metadata"
COMMON = "common.pt"
BACKEND = "metadata.json"
SUFFIX = ".distcp"
Box = tuple[slice, ...]


@dataclass(frozen=True)
class Entry:
    """One part of a tensor, or one object, in a file.

    shape, dtype:   of the whole tensor; None for objects. offset, size: of the part in it.
    start, length:  in bytes, of what torch.save wrote, in `file`.
    """

    key: str
    file: str
    start: int
    length: int
    shape: tuple[int, ...] | None = None
    dtype: torch.dtype | None = None
    offset: tuple[int, ...] = ()
    size: tuple[int, ...] = ()

    @property
    def box(self) -> Box:
        return tuple(slice(o, o + n) for o, n in zip(self.offset, self.size, strict=True))


class Writer:
    """Writes parts into `folder`/`name`.distcp, which no other process writes."""

    def __init__(self, folder: Path, name: str):
        self._folder, self.name, self.file = folder, name, f"{name}{SUFFIX}"
        self.entries: list[Entry] = []
        self._stream = HashedFile(folder / self.file)

    def tensor(self, key: str, shape: Sequence[int], offset: Sequence[int], part: torch.Tensor) -> None:
        """`part` of the tensor `key` of this shape begins at `offset`; leading axes of size 1 may be left out."""
        size = (1,) * (len(shape) - part.dim()) + tuple(part.shape)
        # torch.save writes all that a tensor is a view of.
        part = part.detach().cpu().contiguous().view(size)
        if part.untyped_storage().nbytes() != part.nbytes:
            part = part.clone()
        start, length = self._save(part)
        self.entries.append(
            Entry(key, self.file, start, length, tuple(shape), part.dtype, tuple(offset), size))

    def object(self, key: str, value: Any) -> None:
        start, length = self._save(value)
        self.entries.append(Entry(key, self.file, start, length))

    def close(self) -> None:
        """Sync to disk, and then say so in a file beside it."""
        checksum = self._stream.close_synced()
        listing = self._folder / f"{self.name}.json"
        unfinished = listing.with_suffix(".json.new")
        unfinished.write_text(json.dumps({"checksum": checksum, "entries": [
            {**asdict(e), "dtype": e.dtype and str(e.dtype).removeprefix("torch.")} for e in self.entries]}))
        unfinished.rename(listing)

    def _save(self, value: Any) -> tuple[int, int]:
        start = self._stream.tell()
        torch.save(value, self._stream)
        return start, self._stream.tell() - start


class HashedFile(io.RawIOBase):
    """A new file that is written from its beginning to its end."""

    def __init__(self, path: Path):
        super().__init__()
        self._file, self._hash = path.open("xb", buffering=1 << 20), xxhash.xxh3_128()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._hash.update(data)
        return self._file.write(data)

    def tell(self) -> int:
        return self._file.tell()

    def close_synced(self) -> str:
        """xxh3_128 of all that was written, in hex."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self.close()
        return self._hash.hexdigest()

    def close(self) -> None:
        self._file.close()
        super().close()


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


def assemble(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """Make what the writers of these names left in `folder` a checkpoint; file → xxh3_128 of its content, in hex.

    All have closed, and one of them, or the caller, has written `COMMON`.
    """
    checksums, tensors, stored = {}, {}, {}
    for name in names:
        listing = json.loads((folder / f"{name}.json").read_text())
        checksums[f"{name}{SUFFIX}"] = listing["checksum"]
        for entry in listing["entries"]:
            where = _StorageInfo(entry["file"], entry["start"], entry["length"])
            if entry["shape"] is None:
                tensors[entry["key"]] = BytesStorageMetadata()
                stored[MetadataIndex(entry["key"])] = where
                continue
            offset, size = torch.Size(entry["offset"]), torch.Size(entry["size"])
            tensor = tensors.setdefault(entry["key"], TensorStorageMetadata(
                TensorProperties(dtype=getattr(torch, entry["dtype"])), torch.Size(entry["shape"]), []))
            stored[MetadataIndex(entry["key"], offset, len(tensor.chunks))] = where
            tensor.chunks.append(ChunkStorageMetadata(offset, size))
    _write_synced(folder / METADATA, pickle.dumps(Metadata(tensors, None, stored, StorageMeta())))
    _write_synced(folder / BACKEND, json.dumps({
        "sharded_backend": "torch_dist", "sharded_backend_version": 1,
        "common_backend": "torch", "common_backend_version": 1}).encode())
    for name in names:
        (folder / f"{name}.json").unlink()
    return checksums


@dataclass(frozen=True)
class Stored:
    """A tensor of a checkpoint."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: list[Entry]


class Reader:
    """A checkpoint's tensors, read box by box; CheckpointError when it is none, or damaged."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.tensors: dict[str, Stored] = {}
        self.objects: dict[str, Entry] = {}
        self._maps: dict[str, mmap.mmap] = {}
        metadata = _metadata(folder)
        for index, info in metadata.storage_data.items():
            where = (index.fqn, str(info.relative_path), info.offset, info.length)
            held = metadata.state_dict_metadata[index.fqn]
            if isinstance(held, BytesStorageMetadata):
                self.objects[index.fqn] = Entry(*where)
                continue
            stored = self.tensors.setdefault(index.fqn, Stored(tuple(held.size), held.properties.dtype, []))
            size = next(tuple(chunk.sizes) for chunk in _at(held.chunks, index))
            stored.parts.append(Entry(*where, stored.shape, stored.dtype, tuple(index.offset), size))

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
        start, length = self._payload(part)
        size = prod(part.size) * part.dtype.itemsize
        if length != size:
            raise CheckpointError(f"{self.folder / part.file}: {part.key} at {part.offset} has {length} bytes, "
                                  f"{size} are expected of {part.dtype} {part.size}")
        flat = torch.frombuffer(self._map(part.file), dtype=torch.uint8, count=size, offset=start) if size else (
            torch.empty(0, dtype=torch.uint8))
        return flat.view(part.dtype).view(part.size)

    def object(self, key: str) -> Any:
        entry = self.objects[key]
        data = self._map(entry.file)[entry.start : entry.start + entry.length]
        try:
            return torch.load(io.BytesIO(data), weights_only=True)
        except Exception as error:
            raise CheckpointError(f"{self.folder / entry.file}: {key} is damaged: {error}") from error

    def common(self) -> dict[str, Any]:
        """What is the same on all ranks."""
        try:
            return torch.load(self.folder / COMMON, weights_only=True)
        except Exception as error:
            raise CheckpointError(f"{self.folder / COMMON} is missing or damaged: {error}") from error

    def damaged(self) -> list[str]:
        """Keys of parts whose bytes are not those that were written, each with its file."""
        return [f"{self.folder / entry.file}: {entry.key}" + (f" at {entry.offset}" if entry.offset else "")
                for entry in (*self.objects.values(), *(p for t in self.tensors.values() for p in t.parts))
                if not self.intact(entry)]

    def intact(self, entry: Entry) -> bool:
        """Whether the bytes of a part, or object, are those that were written."""
        try:
            if entry.shape is None:
                with zipfile.ZipFile(_Slice(self._map(entry.file), entry.start, entry.length)) as opened:
                    return opened.testzip() is None
            start, length = self._payload(entry)
            with memoryview(self._map(entry.file)) as data, data[start : start + length] as values:
                return zlib.crc32(values) == self._record(entry).CRC
        except Exception:
            # What has other bytes than an archive's can fail to be one in any way.
            return False

    def _stored(self, key: str) -> Stored:
        if key not in self.tensors:
            near = difflib.get_close_matches(key, self.tensors, 1)
            raise CheckpointError(f"{self.folder} has no tensor {key}" + (f"; did you mean {near[0]}?" if near else ""))
        return self.tensors[key]

    def _map(self, file: str) -> mmap.mmap:
        if file not in self._maps:
            path = self.folder / file
            try:
                with path.open("rb") as opened:
                    self._maps[file] = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{path} is missing or empty: {error}") from error
        return self._maps[file]

    def _payload(self, part: Entry) -> tuple[int, int]:
        """Where in the file the elements begin, and how many bytes they take."""
        record = self._record(part)
        # A local header's name and padding are of lengths that it tells itself.
        header = part.start + record.header_offset
        name, extra = struct.unpack_from("<HH", self._map(part.file), header + 26)
        return header + 30 + name + extra, record.file_size

    def _record(self, part: Entry) -> zipfile.ZipInfo:
        """Of the elements, in the archive that torch.save made of a part."""
        archive = _Slice(self._map(part.file), part.start, part.length)
        try:
            with zipfile.ZipFile(archive) as opened:
                return next(info for info in opened.infolist() if info.filename.endswith("/data/0"))
        except (zipfile.BadZipFile, StopIteration, OSError, struct.error) as error:
            raise CheckpointError(
                f"{self.folder / part.file}: {part.key} at {part.offset} is damaged: {error}") from error


class _Slice(io.RawIOBase):
    """A part of a mapped file as a file."""

    def __init__(self, data: mmap.mmap, start: int, length: int):
        super().__init__()
        self._data, self._start, self._length, self._at = data, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        start = self._start + self._at
        data = self._data[start : min(start + len(buffer), self._start + self._length)]
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


class _MetadataUnpickler(pickle.Unpickler):
    """Makes nothing but what describes a checkpoint."""

    ALLOWED = ("torch.distributed.checkpoint.", "megatron.core.dist_checkpointing.")
    NAMES = frozenset({
        ("torch", "Size"), ("torch", "device"), ("torch.serialization", "_get_layout"), ("collections", "OrderedDict"),
        ("pathlib", "PosixPath"), ("torch._C._distributed_c10d", "Store")})

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if module.startswith(self.ALLOWED) or is_dtype or (module, name) in self.NAMES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint's metadata")


def write_common(folder: Path, common: Mapping[str, Any]) -> None:
    """What is the same on all ranks: plain values and tensors."""
    data = io.BytesIO()
    torch.save(dict(common), data)
    _write_synced(folder / COMMON, data.getvalue())


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _metadata(folder: Path) -> Metadata:
    backend = folder / BACKEND
    try:
        found = json.loads(backend.read_text()).get("sharded_backend")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder} is no distributed checkpoint: {BACKEND}: {error}") from error
    if found != "torch_dist":
        raise CheckpointError(f"{backend}: 'sharded_backend' = {found!r} is not implemented; supported: 'torch_dist'")
    try:
        with (folder / METADATA).open("rb") as file:
            return _MetadataUnpickler(file).load()
    except Exception as error:
        raise CheckpointError(f"{folder / METADATA} is missing or damaged: {error}") from error


def _at(chunks: Sequence[ChunkStorageMetadata], index: MetadataIndex) -> list[ChunkStorageMetadata]:
    """Those at the index's offset; the index says where it was, once."""
    if index.index is not None and index.index < len(chunks) and chunks[index.index].offsets == index.offset:
        return [chunks[index.index]]
    return [chunk for chunk in chunks if chunk.offsets == index.offset]


def intersection(a: Box, b: Box) -> Box | None:
    """What two boxes of a tensor have in common; None when that is nothing."""
    common = tuple(slice(max(x.start, y.start), min(x.stop, y.stop)) for x, y in zip(a, b, strict=True))
    return common if all(s.start < s.stop for s in common) else None


def relative(box: Box, origin: Sequence[int]) -> Box:
    """The same elements in a tensor that begins at `origin`."""
    return tuple(slice(s.start - o, s.stop - o) for s, o in zip(box, origin, strict=True))

"""The index of a checkpoint of Megatron-core's format 'torch_dist': what is in which file, and where.

    .metadata       torch.distributed.checkpoint's Metadata, pickled; what unpickles it makes nothing else
    metadata.json   names the format
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import reduce
from itertools import combinations
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
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

from megatron_pbsd.boxes import Box, intersection
from megatron_pbsd.checkpointing.errors import CheckpointError
from megatron_pbsd.checkpointing.files import write_synced

METADATA = ".metadata"
BACKEND = "metadata.json"


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


@dataclass(frozen=True)
class Stored:
    """A tensor of a checkpoint."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: list[Entry]


def write_index(folder: Path, entries: Iterable[Entry]) -> None:
    """CheckpointError when a part is there twice."""
    tensors, stored = {}, {}
    for entry in entries:
        where = _StorageInfo(entry.file, entry.start, entry.length)
        if entry.shape is None:
            tensors[entry.key] = BytesStorageMetadata()
            stored[MetadataIndex(entry.key)] = where
            continue
        offset, size = torch.Size(entry.offset), torch.Size(entry.size)
        tensor = tensors.setdefault(entry.key, TensorStorageMetadata(
            TensorProperties(dtype=entry.dtype), torch.Size(entry.shape), []))
        index = MetadataIndex(entry.key, offset, len(tensor.chunks))
        if index in stored:
            raise CheckpointError(f"{folder}: {entry.key} at {entry.offset} is in {stored[index].relative_path} "
                                  f"and in {entry.file}")
        stored[index] = where
        tensor.chunks.append(ChunkStorageMetadata(offset, size))
    write_synced(folder / METADATA, pickle.dumps(Metadata(tensors, None, stored, StorageMeta())))
    write_synced(folder / BACKEND, json.dumps({
        "sharded_backend": "torch_dist", "sharded_backend_version": 1,
        "common_backend": "torch", "common_backend_version": 1}).encode())


def read_index(folder: Path) -> list[Entry]:
    """What is in a checkpoint, by its index."""
    try:
        return list(_entries(folder, _metadata(folder)))
    except (AttributeError, TypeError, ValueError) as error:  # of what is no longer what it was
        raise CheckpointError(f"{folder / METADATA} is damaged: {error}") from error


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


def _entries(folder: Path, metadata: Metadata) -> Iterator[Entry]:
    for index, info in metadata.storage_data.items():
        where = (index.fqn, str(info.relative_path), info.offset, info.length)
        held = metadata.state_dict_metadata.get(index.fqn)
        if isinstance(held, BytesStorageMetadata):
            yield Entry(*where)
        elif held is not None and (chunk := _chunk(held.chunks, index)) is not None:
            yield Entry(*where, tuple(held.size), held.properties.dtype, tuple(index.offset), tuple(chunk.sizes))
        else:
            raise CheckpointError(f"{folder / METADATA} is damaged: it does not describe {index.fqn} at {index.offset}")


def _chunk(chunks: Sequence[ChunkStorageMetadata], index: MetadataIndex) -> ChunkStorageMetadata | None:
    """The one at the index's offset; the index says where it was, once."""
    if index.index is not None and index.index < len(chunks) and chunks[index.index].offsets == index.offset:
        return chunks[index.index]
    return next((chunk for chunk in chunks if chunk.offsets == index.offset), None)


def tiling_problem(tensor: Stored) -> str:
    """Of the parts of a tensor; empty when they tile it."""
    if any(o < 0 or o + n > whole or n < 0 for part in tensor.parts
           for o, n, whole in zip(part.offset, part.size, tensor.shape, strict=True)):
        return f"{list(tensor.shape)} has parts outside it"
    edges = [sorted({0, n, *(p.offset[d] for p in tensor.parts), *(p.offset[d] + p.size[d] for p in tensor.parts)})
             for d, n in enumerate(tensor.shape)]
    places = [{edge: i for i, edge in enumerate(e)} for e in edges]
    times = np.zeros([len(e) - 1 for e in edges], int)
    for part in tensor.parts:
        times[tuple(slice(at[s.start], at[s.stop]) for at, s in zip(places, part.box, strict=True))] += 1
    if (times > 1).any():
        a, b = next((a, b) for a, b in combinations(tensor.parts, 2) if intersection(a.box, b.box) is not None)
        return (f"{list(tensor.shape)} has the same elements twice: at {a.offset} in {a.file}, at {b.offset} in "
                f"{b.file}")
    sizes = reduce(np.multiply.outer, map(np.diff, edges), np.ones((), int))
    missing = int(sizes[times == 0].sum())
    return f"{list(tensor.shape)} lacks {missing} of {prod(tensor.shape)} elements" if missing else ""


class _MetadataUnpickler(pickle.Unpickler):
    """Makes nothing but what describes a checkpoint."""

    ALLOWED = ("torch.distributed.checkpoint.", "megatron.core.dist_checkpointing.")
    NAMES = frozenset({
        ("torch", "Size"), ("torch", "device"), ("torch.serialization", "_get_layout"), ("collections", "OrderedDict"),
        ("pathlib", "PosixPath"), ("torch._C._distributed_c10d", "Store")})

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in self.NAMES:
            return super().find_class(module, name)
        # Only classes: a function of these packages may do anything.
        if module.startswith(self.ALLOWED) and isinstance(found := super().find_class(module, name), type):
            return found
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint's metadata")


def _member(kind: Any, name: str) -> Enum:
    """What Python 3.11 before 3.11.4 pickles a member of an enumeration as: getattr(kind, name)."""
    if isinstance(kind, type) and issubclass(kind, Enum) and name in kind.__members__:
        return kind[name]
    raise pickle.UnpicklingError(f"{name} of {kind!r} has no place in a checkpoint's metadata")

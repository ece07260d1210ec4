"""Weights in Hugging Face folders: safetensors files, one or several with an index.

    model.safetensors                                             one file, or
    model.safetensors.index.json, model-00001-of-00002.safetensors, …   tensor name → file
    checksums.json                                                xxh3_128 of each tensor's bytes; only ours have it

A safetensors file is the length of its header (8 bytes, little-endian), the header (JSON: name → dtype, shape, first
and last byte), and the tensors' bytes without gaps (github.com/huggingface/safetensors, "Format").
"""

from __future__ import annotations

import difflib
import json
import shutil
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
import xxhash

from megatron_pbsd.checkpointing.files import HashedFile, MappedFile
from megatron_pbsd.models.errors import ModelError
from megatron_pbsd.models.parameters import Index

SINGLE, INDEX, CHECKSUMS = "model.safetensors", "model.safetensors.index.json", "checksums.json"
CARRIED = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
    "chat_template.json")
"""Files that go where a model's weights go, those of them that it has."""
DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
FLOATS = ("float32", "bfloat16", "float16")
"""What weights may be stored as."""
LONGEST_HEADER = 100 << 20
"""Bytes; what safetensors itself reads."""

Source = Callable[[str, Index], torch.Tensor]
"""(Hugging Face name, index) → that part of the tensor."""


@dataclass(frozen=True)
class HfTensor:
    """start: of its bytes in `file`."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class HfFolder:
    """A folder's tensors, read part by part. ModelError naming all that is missing, truncated or contradictory.

    tensors: those of a folder of which nothing but they needs to be there yet; nothing is checked.
    """

    def __init__(self, folder: str | Path, tensors: Mapping[str, HfTensor] | None = None):
        self.folder = Path(folder)
        self.tensors: dict[str, HfTensor] = dict(tensors or {})
        self._maps: dict[str, MappedFile] = {}
        if tensors is None:
            self._describe()

    def _describe(self) -> None:
        index = _weight_map(self.folder)
        problems: list[str] = []
        for file in sorted(set(index.values())) if index is not None else [SINGLE]:
            found, wrong = _header(self.folder, file)
            problems += wrong
            problems += [f"{file}: {name} is in {self.tensors[name].file} too" for name in found
                         if name in self.tensors]
            self.tensors |= found
        if index is not None and not problems:
            problems += [f"{INDEX}: {name} is said to be in {file}, which lacks it" for name, file in index.items()
                         if name not in self.tensors or self.tensors[name].file != file]
            problems += [f"{INDEX} does not name {name}, which is in {tensor.file}"
                         for name, tensor in self.tensors.items() if name not in index]
        if problems:
            raise ModelError(f"weights in {self.folder}: " + "; ".join(problems))

    def read(self, name: str, index: Index) -> torch.Tensor:
        """That part of the tensor: a view of the file, not to be written to."""
        return self._part(self.tensors[name], index)

    def _part(self, tensor: HfTensor, index: Index) -> torch.Tensor:
        if not index:
            return self._rows(tensor, tensor.start, tensor.shape)
        rows, *columns = index
        size = prod(tensor.shape[1:]) * tensor.dtype.itemsize
        shape = (rows.stop - rows.start, *tensor.shape[1:])
        return self._rows(tensor, tensor.start + rows.start * size, shape)[(slice(None), *columns)]

    def release(self) -> None:
        """Let go of the pages that were read; they come back when they are read again."""
        for mapped in self._maps.values():
            mapped.release()

    def forget(self) -> None:
        """Let go of all tensors' pages, and let the page cache use those that are on disk for something else."""
        for file, mapped in self._maps.items():
            held = [tensor for tensor in self.tensors.values() if tensor.file == file]
            mapped.forget(min(t.start for t in held), max(t.start + t.nbytes for t in held))

    def checksums(self) -> dict[str, str]:
        """Tensor → xxh3_128 of its bytes, in hex, as whoever wrote the folder left them; often nobody did."""
        path = self.folder / CHECKSUMS
        try:
            return json.loads(path.read_text())["tensors"] if path.is_file() else {}
        except (ValueError, KeyError, TypeError) as error:
            raise ModelError(f"{path} is damaged: {error}") from error

    def problems(self, shapes: Mapping[str, Sequence[int]], ignored: Callable[[str], bool]) -> list[str]:
        """Every tensor that is missing, unexpected or of another shape; those that are `ignored` may be there."""
        missing = [name for name in shapes if name not in self.tensors]
        unexpected = [name for name in self.tensors if name not in shapes and not ignored(name)]
        return [
            *(f"{name} is missing{_near(name, unexpected)}" for name in missing),
            *(f"{name} is unexpected{_near(name, missing)}" for name in unexpected),
            *(f"{name} has shape {self.tensors[name].shape}, config.json implies {tuple(shape)}"
              for name, shape in shapes.items()
              if name in self.tensors and self.tensors[name].shape != tuple(shape))]

    def _rows(self, tensor: HfTensor, start: int, shape: Sequence[int]) -> torch.Tensor:
        if tensor.file not in self._maps:
            self._maps[tensor.file] = MappedFile(self.folder / tensor.file)
        return self._maps[tensor.file].tensor(tensor.dtype, shape, start)


def stored(folder: str | Path, shapes: Mapping[str, tuple[int, ...]], ignored: Callable[[str], bool]) -> Source:
    """Tensors of a folder's safetensors files, read part by part; those that are `ignored` may be there.

    ModelError naming every tensor that is missing, unexpected or of another shape.
    """
    opened = HfFolder(folder)
    if problems := opened.problems(shapes, ignored):
        raise ModelError(f"weights in {folder}: " + "; ".join(problems))
    return opened.read


Described = Mapping[str, tuple[torch.dtype, Sequence[int]]]
"""Name → dtype and shape."""


def laid_out(file: str, tensors: Described) -> tuple[bytes, dict[str, HfTensor]]:
    """What a file of these tensors, in this order, begins with, and where in it they will be."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # tensors begin at multiples of 8
    first = 8 + len(encoded)
    return struct.pack("<Q", len(encoded)) + encoded, {
        name: HfTensor(file, dtype, tuple(shape), first + header[name]["data_offsets"][0])
        for name, (dtype, shape) in tensors.items()}


class HfFile:
    """Writes one safetensors file from beginning to end, or a part of it.

    tensors: in the order in which they will be written.
    names: consecutive ones that are written here; None: all, and the file is new. Others may write the rest meanwhile;
    who writes the first tensor writes the header.
    """

    def __init__(self, path: Path, tensors: Described, names: Sequence[str] | None = None):
        begin, places = laid_out(path.name, tensors)
        whole = names is None
        here = [places[name] for name in (places if names is None else names)]
        heads = whole or names[0] == next(iter(places))
        self._left = sum(tensor.nbytes for tensor in here)
        self._stream = HashedFile(path, None if whole else 0 if heads else here[0].start)
        if heads:
            self._stream.write(begin)

    def write(self, part: torch.Tensor) -> None:
        """The next elements, contiguous in the tensor they belong to."""
        self._left -= self._stream.write(raw(part))

    def close(self) -> None:
        """Sync to disk."""
        if self._left:
            raise ValueError(f"{self._left} bytes of the promised tensors were not written")
        self._stream.close_synced()


def write_index(folder: Path, files: Mapping[str, Iterable[str]], nbytes: int, checksums: Mapping[str, str]) -> None:
    """What makes safetensors files (file → names in it, of `nbytes` in all) a folder: the index where there are
    several, and the checksums if any."""
    if set(files) != {SINGLE}:
        weight_map = {name: file for file, names in files.items() for name in names}
        (folder / INDEX).write_text(json.dumps(
            {"metadata": {"total_size": nbytes}, "weight_map": weight_map}, indent=1, sort_keys=True))
    if checksums:
        (folder / CHECKSUMS).write_text(json.dumps(
            {"xxh3_128": "of each tensor's bytes", "tensors": dict(checksums)}, indent=1))


def shard_names(count: int) -> list[str]:
    """File names of a model in `count` files, as transformers has them."""
    return [SINGLE] if count == 1 else [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]


def carry(origin: Path, folder: Path) -> None:
    """Copy configuration and tokenizer."""
    for name in CARRIED:
        if (origin / name).is_file():
            shutil.copyfile(origin / name, folder / name)


def raw(tensor: torch.Tensor) -> memoryview:
    """Its bytes, without a copy where it is contiguous."""
    return memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())


def digest(parts: Iterable[torch.Tensor]) -> str:
    """xxh3_128 of the bytes of all parts together, in hex."""
    state = xxhash.xxh3_128()
    for part in parts:
        state.update(raw(part))
    return state.hexdigest()


def _weight_map(folder: Path) -> dict[str, str] | None:
    """Tensor → file as the index has it; None where one file has all."""
    path = folder / INDEX
    if path.is_file():
        try:
            found = json.loads(path.read_text())["weight_map"]
            if not found or not all(isinstance(x, str) for pair in found.items() for x in pair):
                raise ValueError("weight_map does not map tensors to files")
            return found
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{path} is damaged: {error}") from error
    if (folder / SINGLE).is_file():
        return None
    others = sorted(p.name for p in folder.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".safetensors"))
    raise ModelError(f"{folder} has neither {SINGLE} nor {INDEX}"
                     + (f", but {', '.join(others[:4])}" if others else "")
                     + "; model.initial_weights = 'random' starts without weights")


def _header(folder: Path, file: str) -> tuple[dict[str, HfTensor], list[str]]:
    """Tensors of a file, and what is wrong with it."""
    path = folder / file
    try:
        size = path.stat().st_size
        with path.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if size < 8 or length > min(size - 8, LONGEST_HEADER):
                return {}, [f"{file} is truncated or damaged: its header should have {length} bytes, "
                            f"the file has {size}"]
            header = json.loads(opened.read(length))
        described = {name: value for name, value in header.items() if name != "__metadata__"}
        ordered = sorted(described.items(), key=lambda item: item[1]["data_offsets"])
    except FileNotFoundError:
        return {}, [f"{file} is missing"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return {}, [f"{file} is damaged: {error}"]
    tensors, problems, end = {}, [], 0
    for name, value in ordered:
        try:
            start, stop = value["data_offsets"]
            shape, dtype = tuple(map(int, value["shape"])), DTYPES.get(value["dtype"])
        except (ValueError, KeyError, TypeError) as error:
            problems.append(f"{file}: the header's entry of {name} is damaged: {error!r}")
            continue
        if dtype is None:
            problems.append(f"{file}: {name} is {value['dtype']}; known are {', '.join(DTYPES)}")
        elif start != end or stop - start != prod(shape) * dtype.itemsize or min(shape, default=0) < 0:
            problems.append(f"{file}: {name} has bytes {start} to {stop}, expected {prod(shape) * dtype.itemsize} "
                            f"of {dtype} {list(shape)} from {end} on")
        elif 8 + length + stop > size:
            problems.append(f"{file} is truncated: it has {size} bytes, but {name} ends at {8 + length + stop}")
        else:
            tensors[name] = HfTensor(file, dtype, shape, 8 + length + start)
        end = stop
    if not problems and size != 8 + length + end:
        problems.append(f"{file} has {size - 8 - length - end} bytes after its last tensor")
    return tensors, problems


def _near(name: str, others: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, others, 1, 0.9)
    return f"; did you mean {near[0]}?" if near else ""

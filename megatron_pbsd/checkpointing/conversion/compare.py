"""Whether a Hugging Face folder or a checkpoint is what was written, and whether two hold the same, bit by bit."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import torch

from megatron_pbsd.checkpointing.block_scaled import read_plain, weights
from megatron_pbsd.checkpointing.conversion.locate import changed_index, is_hf, locate, model_config
from megatron_pbsd.checkpointing.conversion.plan import PIECE, Box, Digests, Meter, box_steps, require
from megatron_pbsd.checkpointing.conversion.to_hf import MegatronWeights, hf_parts
from megatron_pbsd.checkpointing.conversion.to_megatron import left_out_problems
from megatron_pbsd.checkpointing.errors import CheckpointError
from megatron_pbsd.checkpointing.hf_folder import CHECKSUMS
from megatron_pbsd.checkpointing.torch_dist import Reader
from megatron_pbsd.models import family
from megatron_pbsd.models.errors import ModelError

Progress = Callable[[int, int], None]
"""(bytes done, bytes in all)."""


class Weights(Protocol):
    """Tensors by name; `parts` has the elements of each in order, in the same pieces for the same shape."""

    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]

    def parts(self, name: str) -> Iterator[torch.Tensor]: ...

    def release(self) -> None: ...


def damage(folder: Path, config: Path | None = None, progress: Progress = lambda done, total: None) -> list[str]:
    """What in a folder is not what was written, or does not fit its config.json, as far as the folder says; empty when
    all is well."""
    return _hf_damage(folder, progress) if is_hf(folder) else _checkpoint_damage(locate(folder), config, progress)


def differences(
    a: Path, b: Path, config: Path | None = None, progress: Progress = lambda done, total: None
) -> tuple[list[str], int]:
    """What differs between two folders, each a Hugging Face folder or a checkpoint, and how many tensors were compared.

    Weights by their Hugging Face names, unless both are checkpoints: then all tensors by their keys. config: of the
    model, where neither says.
    """
    if is_hf(a) or is_hf(b):
        one, other = (_HfWeights(x) if is_hf(x) else _Named(x, config or (a if is_hf(a) else b)) for x in (a, b))
    else:
        one, other = _Keyed(a), _Keyed(b)
    found = [f"{name} is in {a if name in one.tensors else b} only"
             for name in sorted(one.tensors.keys() ^ other.tensors.keys())]
    common = [name for name in one.tensors if name in other.tensors]
    total, done = sum(_nbytes(*one.tensors[name]) for name in common), 0

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress(done, total)

    meter = Meter(count, one, other)
    for name in common:
        if one.tensors[name] != other.tensors[name]:
            found.append(f"{name} is {_words(*one.tensors[name])} in {a}, {_words(*other.tensors[name])} in {b}")
            continue
        elements = 0
        for mine, theirs in zip(one.parts(name), other.parts(name), strict=True):
            one_bits, other_bits = _bits(mine), _bits(theirs)
            if not torch.equal(one_bits, other_bits):
                elements += int((one_bits != other_bits).any(-1).sum())
            meter(mine.nbytes)
        if elements:
            found.append(f"{name} differs in {elements} elements")
    return found, len(common)


class _HfWeights:
    def __init__(self, folder: Path):
        self._folder = weights(folder)
        skip = _ignored(folder)
        self.tensors = {name: (t.dtype, t.shape) for name, t in self._folder.tensors.items() if not skip(name)}

    def parts(self, name: str) -> Iterator[torch.Tensor]:
        return (part.reshape(-1) for part in _equal_steps(hf_parts(self._folder, name, PIECE)))

    def release(self) -> None:
        self._folder.release()


class _Named:
    """A checkpoint's weights by their Hugging Face names."""

    def __init__(self, folder: Path, config: Path):
        self._weights = MegatronWeights(folder, config)
        require(self._weights.problems())
        self.tensors = {name: (self._weights.dtype(name), shape) for name, shape in self._weights.shapes.items()}

    def parts(self, name: str) -> Iterator[torch.Tensor]:
        return (part.reshape(-1) for part in _equal_steps(self._weights.parts(name, PIECE)))

    def release(self) -> None:
        self._weights.reader.release()


class _Keyed:
    """A checkpoint's tensors by their keys."""

    def __init__(self, folder: Path):
        self._reader = Reader(locate(folder), checked=True)
        require(self._reader.incomplete())
        self.tensors = {key: (t.dtype, t.shape) for key, t in self._reader.tensors.items()}

    def parts(self, name: str) -> Iterator[torch.Tensor]:
        dtype, shape = self.tensors[name]
        whole: Box = tuple(slice(0, n) for n in shape)
        return (self._reader.read(name, box) for box in box_steps(whole, dtype.itemsize, PIECE))

    def release(self) -> None:
        self._reader.release()


def _equal_steps(parts: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The same elements in steps of PIECE bytes, however they come."""
    held: list[torch.Tensor] = []
    for part in parts:
        flat = part.reshape(-1)
        step = PIECE // flat.element_size()
        while flat.numel():
            room = step - sum(t.numel() for t in held)
            held.append(flat[:room])
            flat = flat[room:]
            if sum(t.numel() for t in held) == step:
                yield held[0] if len(held) == 1 else torch.cat(held)
                held = []
    if held:
        yield held[0] if len(held) == 1 else torch.cat(held)


def _hf_damage(folder: Path, progress: Progress) -> list[str]:
    try:
        hf = read_plain(folder)
        model, held = family(hf), weights(folder)
        recorded = held.checksums()
    except ModelError as error:
        return [str(error)]
    found = [f"{folder}: {problem}" for problem in held.problems(
        model.hf_tensors(hf), lambda name: model.ignored_tensor(hf, name))]
    found = found or [f"{folder}: {problem}" for problem in left_out_problems(held, model.decoder(hf))]
    total, done = sum(t.nbytes for t in held.tensors.values()), 0

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress(done, total)

    meter = Meter(count, held)
    digests = Digests()
    for name in held.tensors:
        for part in hf_parts(held, name, PIECE):
            digests.update(name, part)
            meter(part.nbytes)
    found += [f"{folder / held.tensors[name].file}: {name} is not what {CHECKSUMS} says"
              for name in digests.differing(recorded) if name in recorded]
    found += [f"{folder}: {name} is in {CHECKSUMS} only" for name in recorded if name not in held.tensors]
    return found + [f"{folder / file} is not what was published: its sha256 is not its name in the hub's cache"
                    for file in sorted({tensor.file for tensor in held.tensors.values()})
                    if (expected := _published(folder / file)) and expected != _sha256(folder / file)]


def _checkpoint_damage(checkpoint: Path, config: Path | None, progress: Progress) -> list[str]:
    try:
        found = changed_index(checkpoint)
        reader = Reader(checkpoint)
        reader.common()
    except CheckpointError as error:
        return [str(error)]
    parts = [*reader.objects.values(), *(part for tensor in reader.tensors.values() for part in tensor.parts)]
    total, done = sum(part.length for part in parts), 0
    for part in parts:
        if not reader.intact(part):
            found.append(f"{checkpoint / part.file}: {part.key}" + (f" at {part.offset}" if part.offset else "")
                         + " is damaged")
        done += part.length
        progress(done, total)
        reader.release()
    if found:
        return found
    try:
        model_config(checkpoint, config)
    except CheckpointError:
        return reader.incomplete()  # of no known model, but whole
    try:
        return MegatronWeights(checkpoint, config).problems()
    except (CheckpointError, ModelError) as error:
        return [str(error)]


def _published(file: Path) -> str | None:
    """sha256 that a file of the Hugging Face hub's cache is to have: there it is a link to what is named so."""
    name = file.resolve().name
    return name if file.is_symlink() and re.fullmatch("[0-9a-f]{64}", name) else None


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _ignored(folder: Path) -> Callable[[str], bool]:
    """Tensors that are no part of the model, if the folder says what model it is of."""
    if not (folder / "config.json").is_file():
        return lambda name: False
    hf = read_plain(folder)
    model = family(hf)
    return lambda name: model.ignored_tensor(hf, name)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """One row of bytes per element."""
    flat = tensor.contiguous().view(-1)
    return flat.view(torch.uint8).view(flat.numel(), -1)


def _nbytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return dtype.itemsize * torch.Size(shape).numel()


def _words(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"

"""Checkpoint of Megatron-core's GPTModel → Hugging Face folder that transformers loads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch

from megatron_pbsd.boxes import Box
from megatron_pbsd.checkpointing.conversion.locate import (
    changed_index,
    locate,
    model_config,
    recorded,
    with_dtype,
    write_config,
)
from megatron_pbsd.checkpointing.conversion.plan import (
    Digests,
    Meter,
    Scratch,
    balanced,
    digests_path,
    read_digests,
    require,
    row_steps,
    snapshot,
    write_digests,
)
from megatron_pbsd.checkpointing.errors import CheckpointError
from megatron_pbsd.checkpointing.hf_folder import (
    FLOATS,
    Described,
    HfFile,
    HfFolder,
    carry,
    laid_out,
    shard_names,
    write_index,
)
from megatron_pbsd.checkpointing.torch_dist import Reader
from megatron_pbsd.models import family
from megatron_pbsd.models.decoder import hf_tensors, kept_in_float32
from megatron_pbsd.models.dist_checkpoint import Place, has_layer_axis, places
from megatron_pbsd.models.errors import ModelError

WEIGHTS = ("decoder.", "embedding.", "output_layer.")
"""Beginnings of the keys of weights; optimizer state and the like have others."""
PADDED = ("embedding.word_embeddings.weight", "output_layer.weight")
"""Megatron-LM adds rows to these, beyond the vocabulary."""
PADDED_TO = 128
"""Megatron-LM's --make-vocab-size-divisible-by, where it is not set."""


class MegatronWeights:
    """A checkpoint's weights under their Hugging Face names. CheckpointError or ModelError when it holds none.

    config: Hugging Face folder of the model; None: what the checkpoint says itself.
    """

    def __init__(self, folder: Path, config: Path | None = None, checked: bool = True):
        self.folder = locate(folder)
        self.hf, self.origin = model_config(self.folder, config)
        self.decoder = family(self.hf).decoder(self.hf)
        self.reader = Reader(self.folder, checked=checked)
        self.shapes = hf_tensors(self.decoder)
        self._places = self._named(places(self.decoder, has_layer_axis(self.reader.tensors)))

    def dtype(self, name: str) -> torch.dtype:
        return self.reader.tensors[self._places[name][0].key].dtype

    def problems(self) -> list[str]:
        """Weights that are missing, unexpected, incomplete or of a shape that config.json does not imply."""
        expected = {place.key: place.shape for parts in self._places.values() for place in parts}
        found = {key: tensor.shape for key, tensor in self.reader.tensors.items() if key.startswith(WEIGHTS)}
        problems = [f"{self.folder}: {key} is missing" for key in expected if key not in found]
        problems += [f"{self.folder}: {key} {list(shape)} is unexpected for this config.json"
                     for key, shape in found.items() if key not in expected]
        problems += [
            f"{self.folder}: {key} has shape {list(found[key])}, config.json implies {list(shape)}"
            for key, shape in expected.items() if key in found and not _fits(key, found[key], shape)]
        problems = problems or self.reader.incomplete()
        problems = problems or [problem for key in PADDED if key in expected
                                for problem in self._padding_problems(key, expected[key])]
        return changed_index(self.folder) + problems

    def parts(self, name: str, piece_bytes: int) -> Iterator[torch.Tensor]:
        """A tensor's elements in order, in pieces of at most `piece_bytes`, one row at least; not to be written to."""
        for place in sorted(self._places[name], key=lambda place: place.hf_index[0].start):
            local = [s.stop - s.start for s in place.hf_index]
            row_bytes = prod(local[1:]) * self.dtype(name).itemsize
            for rows in row_steps(local[0], row_bytes, piece_bytes):
                read = self.reader.read(place.key, _box(place, rows, local))
                yield read.view(-1, *local[1:])[:: place.step]

    def _padding_problems(self, key: str, shape: tuple[int, ...]) -> Iterator[str]:
        """Rows beyond the vocabulary that hold something, and are not as many as Megatron-LM adds."""
        rows = self.reader.tensors[key].shape[0]
        beyond = self.reader.read(key, (slice(shape[0], rows), slice(0, shape[1]))) if rows > shape[0] else None
        if beyond is not None and rows % PADDED_TO and bool((beyond != 0).any()):
            yield (f"{self.folder}: {key} has {rows} rows, config.json says vocab_size = {shape[0]}, and the rows "
                   f"beyond are no padding: they are not 0, nor is {rows} a multiple of {PADDED_TO}")

    def _named(self, found: dict[str, list[Place]]) -> dict[str, list[Place]]:
        """Under the keys that the checkpoint has for them: Megatron-core's own layers name the norm before experts as
        if these had taken it in."""
        if not any(".pre_mlp_layernorm." in place.key for parts in found.values() for place in parts):
            return found

        def renamed(place: Place) -> Place:
            other = place.key.replace(".pre_mlp_layernorm.weight", ".mlp.linear_fc1.layer_norm_weight")
            if place.key in self.reader.tensors or other not in self.reader.tensors:
                return place
            return replace(place, key=other)

        return {name: [renamed(place) for place in parts] for name, parts in found.items()}


@dataclass(frozen=True)
class ToHf:
    """source: a checkpoint. config: folder of the model's configuration and tokenizer; None: those it keeps itself.
    dtype: of the written weights, a torch name; None as they are stored. shard_bytes: a file has no more, unless one
    tensor has. section_bytes: of a file that are written one after another, by one process."""

    source: Path
    config: Path | None = None
    dtype: str | None = None
    shard_bytes: int = 4 << 30
    section_bytes: int = 1 << 30
    piece_bytes: int = 128 << 20

    inner = ""

    def problems(self) -> list[str]:
        try:
            weights = self._weights
            if problems := weights.problems():
                return problems
        except (CheckpointError, ModelError) as error:
            return [str(error)]
        return [f"{weights.folder}: {name} is {weights.dtype(name)}; supported: {', '.join(FLOATS)}"
                for name in weights.shapes if str(weights.dtype(name)).removeprefix("torch.") not in FLOATS]

    def identity(self) -> dict[str, Any]:
        return {"conversion": "megatron-to-hf", "dtype": self.dtype, "shard_bytes": self.shard_bytes,
                "source": snapshot(self._weights.folder), "config": self._weights.hf}

    def sections(self) -> dict[str, int]:
        return {name: sum(map(self._nbytes, names)) for name, (_, names) in self._sections.items()}

    def write(self, folder: Path, name: str, done: Callable[[int], None]) -> None:
        weights, (path, names) = self._weights, self._sections[name]
        meter, scratch, digests = Meter(done, weights.reader), Scratch(), Digests()
        file = HfFile(folder / path, self._described(path), names)
        for tensor in names:
            for part in weights.parts(tensor, self.piece_bytes):
                written = _cast(part, self._dtype(tensor), scratch)
                digests.update(tensor, written)
                file.write(written)
                meter(written.nbytes)
        self._compare(digests)
        file.close()
        write_digests(folder, name, digests.hex())

    def check(self, folder: Path, name: str, done: Callable[[int], None]) -> list[str]:
        path, names = self._sections[name]
        begin, places = laid_out(path, self._described(path))
        with (folder / path).open("rb") as opened:
            if names[0] == next(iter(places)) and opened.read(len(begin)) != begin:
                return [f"{folder / path}: its header is not what was written"]
        written = HfFolder(folder, {tensor: places[tensor] for tensor in names})
        meter, found = Meter(done, written), Digests()
        for tensor in names:
            for part in hf_parts(written, tensor, self.piece_bytes):
                found.update(tensor, part)
                meter(part.nbytes)
        written.forget()
        wanted = read_digests(folder, [name])
        return [f"{folder / path}: {tensor} is not what was read"
                for tensor in {*found.differing(wanted), *(wanted.keys() ^ found.hex().keys())}]

    def discard(self, folder: Path, name: str) -> None:
        digests_path(folder, name).unlink(missing_ok=True)

    def finish(self, folder: Path) -> None:
        write_index(folder, self._plan, sum(self.sections().values()), read_digests(folder, self._sections))
        if self._weights.origin is not None:
            carry(self._weights.origin, folder)
        write_config(folder, with_dtype(self._weights.hf, self.dtype))
        require(HfFolder(folder).problems(self._weights.shapes, lambda name: False))
        for name in self._sections:
            digests_path(folder, name).unlink()

    def damage(self) -> list[str]:
        return self._weights.reader.damaged()

    @cached_property
    def _weights(self) -> MegatronWeights:
        return MegatronWeights(self.source, self.config)

    @cached_property
    def _plan(self) -> dict[str, list[str]]:
        """File → tensors in it."""
        names = list(self._weights.shapes)
        groups = balanced(names, list(map(self._nbytes, names)), self.shard_bytes)
        return dict(zip(shard_names(len(groups)), groups, strict=True))

    @cached_property
    def _sections(self) -> dict[str, tuple[str, list[str]]]:
        """Section → its file, and the consecutive tensors of it."""
        return {f"{file}.{i}": (file, group) for file, names in self._plan.items()
                for i, group in enumerate(balanced(names, list(map(self._nbytes, names)), self.section_bytes))}

    def _described(self, file: str) -> Described:
        return {name: (self._dtype(name), self._weights.shapes[name]) for name in self._plan[file]}

    def _dtype(self, name: str) -> torch.dtype:
        if self.dtype is None or kept_in_float32(name):
            return self._weights.dtype(name)
        return getattr(torch, self.dtype)

    def _nbytes(self, name: str) -> int:
        return prod(self._weights.shapes[name]) * self._dtype(name).itemsize

    def _compare(self, digests: Digests) -> None:
        """With those of an import: what was not trained since is still the same."""
        known: Mapping[str, str] = recorded(self._weights.folder)["tensors"] if self.dtype is None else {}
        require([f"{self._weights.folder}: {name} is not what was imported"
                 for name in digests.differing(known) if name in known])


def hf_parts(folder: HfFolder, name: str, piece_bytes: int) -> Iterator[torch.Tensor]:
    """A tensor's elements in order, in pieces of at most `piece_bytes`, one row at least; not to be written to."""
    shape = folder.tensors[name].shape
    if not shape:
        yield folder.read(name, ())
        return
    row_bytes = prod(shape[1:]) * folder.tensors[name].dtype.itemsize
    for rows in row_steps(shape[0], row_bytes, piece_bytes):
        yield folder.read(name, (rows, *(slice(0, n) for n in shape[1:])))


def _box(place: Place, rows: slice, local: list[int]) -> Box:
    """Of a place, where these rows of it are stored."""
    axes = len(place.offset) - len(local)
    first, *rest = place.offset[axes:]
    start, last = first + rows.start * place.step, first + (rows.stop - 1) * place.step
    return (*(slice(o, o + 1) for o in place.offset[:axes]), slice(start, last + 1),
            *(slice(o, o + n) for o, n in zip(rest, local[1:], strict=True)))


def _fits(key: str, found: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    if key in PADDED:
        return found[1:] == expected[1:] and found[0] >= expected[0]
    return found == expected


def _cast(part: torch.Tensor, dtype: torch.dtype, scratch: Scratch) -> torch.Tensor:
    return part if part.dtype == dtype else scratch.tensor(dtype, part.shape).copy_(part)

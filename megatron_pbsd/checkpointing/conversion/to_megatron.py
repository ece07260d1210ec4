"""Hugging Face folder → checkpoint that Megatron-core's GPTModel loads at any layout."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch

from megatron_pbsd.checkpointing.block_scaled import read_plain, weights
from megatron_pbsd.checkpointing.conversion.locate import (
    CONFIG,
    HF,
    RELEASE,
    TRACKER,
    with_dtype,
    write_checksums,
    write_config,
)
from megatron_pbsd.checkpointing.conversion.plan import (
    PIECE,
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
from megatron_pbsd.checkpointing.conversion.to_hf import hf_parts
from megatron_pbsd.checkpointing.hf_folder import CHECKSUMS, FLOATS, HfFolder, carry, digest
from megatron_pbsd.checkpointing.torch_dist import Reader, Writer, assemble, listed, write_common
from megatron_pbsd.config import ParallelConfig
from megatron_pbsd.models import family
from megatron_pbsd.models.decoder import Decoder, kept_in_float32
from megatron_pbsd.models.dist_checkpoint import Unit, extra_states, units
from megatron_pbsd.models.errors import ModelError
from megatron_pbsd.models.parameters import Piece

FILE_BYTES = 1 << 30
CONTENT = {"non_homogeneous_layers": True, "singleton_local_shards": False}
"""How Megatron-core is to name what it looks for."""
CHECKPOINT_VERSION = 3.0
"""Megatron-LM rearranges attention's rows of anything older."""


@dataclass(frozen=True)
class ToMegatron:
    """source: the folder. dtype: of the written weights, a torch name; None as they are stored.
    layout: the checkpoint is to be trained so, which is checked; it has no influence on what is written."""

    source: Path
    dtype: str | None = None
    layout: ParallelConfig | None = None
    piece_bytes: int = 128 << 20

    inner = RELEASE

    def problems(self) -> list[str]:
        try:
            hf = read_plain(self.source)
            folder, model = self._folder, family(hf)
        except ModelError as error:
            return [str(error)]
        problems = [] if self.layout is None else model.layout_problems(hf, self.layout)
        wrong = folder.problems(model.hf_tensors(hf), lambda name: model.ignored_tensor(hf, name))
        wrong += self._dtype_problems(hf, set(model.hf_tensors(hf)))
        wrong = wrong or self._mixed_dtypes() + left_out_problems(folder, self._decoder)
        return problems + [f"weights in {self.source}: {problem}" for problem in wrong]

    def identity(self) -> dict[str, Any]:
        return {"conversion": "hf-to-megatron", "dtype": self.dtype, "source": snapshot(self.source)}

    def sections(self) -> dict[str, int]:
        return {name: sum(map(self._nbytes, inside)) for name, inside in self._plan.items()}

    def write(self, folder: Path, name: str, done: Callable[[int], None]) -> None:
        meter, scratch = Meter(done, self._folder), Scratch()
        written, given = Digests(), Digests()
        recorded = self._folder.checksums()
        writer = Writer(folder, name)
        for unit in self._plan[name]:
            for rows in self._rows(unit):
                part = self._part(unit, rows, scratch, given if recorded else None)
                for hf_name, inside in _overlaps(unit, rows):
                    written.update(hf_name, part[inside])
                writer.tensor(unit.key, unit.shape, (*unit.axes, rows.start, *[0] * (part.dim() - 1)), part)
                meter(part.nbytes)
        if name == next(iter(self._plan)):
            nothing = io.BytesIO()
            torch.save([torch.empty(0, dtype=torch.uint8)], nothing)
            for key in extra_states(self._decoder):
                writer.saved_object(key, nothing.getvalue())
        require([f"{self.source / self._folder.tensors[tensor].file}: {tensor} is not what {CHECKSUMS} says"
                 for tensor in given.differing(recorded) if tensor in recorded])
        writer.close()
        write_digests(folder, name, written.hex())

    def check(self, folder: Path, name: str, done: Callable[[int], None]) -> list[str]:
        reader = Reader(folder, listed(folder, name)[1], checked=True)
        meter, found = Meter(done, reader), Digests()
        for unit in self._plan[name]:
            for rows in self._rows(unit):
                box = (*(slice(i, i + 1) for i in unit.axes), rows, *(slice(0, n) for n in unit.local[1:]))
                part = reader.read(unit.key, box).flatten(0, len(unit.axes))
                for hf_name, inside in _overlaps(unit, rows):
                    found.update(hf_name, part[inside])
                meter(part.nbytes)
        reader.forget()
        wanted = read_digests(folder, [name])
        return [f"{folder / name}: {tensor} is not what was read" for tensor in found.differing(wanted)]

    def discard(self, folder: Path, name: str) -> None:
        for path in (digests_path(folder, name), *folder.glob(f"{name}.*")):
            path.unlink(missing_ok=True)

    def finish(self, folder: Path) -> None:
        tensors = read_digests(folder, self._plan)
        write_common(folder, {
            "checkpoint_version": CHECKPOINT_VERSION, "iteration": 0, "content_metadata": CONTENT,
            CONFIG: self._config()})
        files = assemble(folder, list(self._plan))
        require(Reader(folder).incomplete())
        (folder / HF).mkdir(exist_ok=True)
        carry(self.source, folder / HF)
        write_config(folder / HF, self._config())
        write_checksums(folder, files, tensors)
        (folder.parent / TRACKER).write_text(RELEASE)
        for name in self._plan:
            digests_path(folder, name).unlink()

    def damage(self) -> list[str]:
        return []

    @cached_property
    def _folder(self) -> HfFolder:
        return weights(self.source, self.dtype)

    @cached_property
    def _decoder(self) -> Decoder:
        hf = read_plain(self.source)
        return family(hf).decoder(hf)

    @cached_property
    def _plan(self) -> dict[str, list[Unit]]:
        """File → what goes into it. A unit is never divided over files: its tensors are checked where they are."""
        every = units(self._decoder)
        groups = balanced(every, list(map(self._nbytes, every)), FILE_BYTES)
        return {f"__{i}_0": group for i, group in enumerate(groups)}

    def _dtype_problems(self, hf: dict[str, Any], names: set[str]) -> list[str]:
        stored = {name: tensor.dtype for name, tensor in self._folder.tensors.items() if name in names}
        problems = [f"{name} is {_name(dtype)}; supported: {', '.join(FLOATS)}" for name, dtype in stored.items()
                    if _name(dtype) not in FLOATS]
        if problems or self.dtype is not None:
            return problems
        declared = hf.get("dtype", hf.get("torch_dtype"))
        others = [name for name, dtype in stored.items() if _name(dtype) != declared and not kept_in_float32(name)]
        if declared is not None and others:
            found = sorted({_name(stored[name]) for name in others})
            problems.append(
                f"config.json says dtype = {declared!r}, but {len(others)} tensors are {' and '.join(found)}, "
                f"{others[0]} for one; say which it is to be with --dtype {found[0]} or --dtype {declared}")
        return problems

    def _mixed_dtypes(self) -> list[str]:
        if self.dtype is not None:
            return []
        return [f"{', '.join(p.hf_name for p in unit.pieces[:3])} are one tensor to Megatron, but of several dtypes; "
                "choose one with --dtype" for unit in units(self._decoder)
                if len({self._folder.tensors[piece.hf_name].dtype for piece in unit.pieces}) > 1]

    def _config(self) -> dict[str, Any]:
        return with_dtype(read_plain(self.source), self.dtype)

    def _dtype(self, unit: Unit) -> torch.dtype:
        name = unit.pieces[0].hf_name
        if self.dtype is None or kept_in_float32(name):
            return self._folder.tensors[name].dtype
        return getattr(torch, self.dtype)

    def _nbytes(self, unit: Unit) -> int:
        return prod(unit.local) * self._dtype(unit).itemsize

    def _rows(self, unit: Unit) -> Iterable[slice]:
        if any(_step(piece) > 1 for piece in unit.pieces):
            return [slice(0, unit.local[0])]  # in steps, a Hugging Face tensor's rows would not come in their order
        return row_steps(unit.local[0], self._nbytes(unit) // unit.local[0], self.piece_bytes)

    def _part(self, unit: Unit, rows: slice, scratch: Scratch, given: Digests | None) -> torch.Tensor:
        """These rows of a unit: a view of the file where it has them so, else put together in `scratch`."""
        dtype, overlaps = self._dtype(unit), list(_overlaps(unit, rows))
        made = None
        if len(unit.pieces) > 1 or self._folder.tensors[unit.pieces[0].hf_name].dtype != dtype:
            made = scratch.tensor(dtype, (rows.stop - rows.start, *unit.local[1:]))
        for (name, inside), index in zip(overlaps, _hf_indices(unit, rows), strict=True):
            values = self._folder.read(name, index)
            if given is not None:
                given.update(name, values)
            if made is None:
                return values
            made[inside] = values
        return made


def left_out_problems(folder: HfFolder, decoder: Decoder) -> list[str]:
    """Tensors that are no part of the model, according to config.json, but according to the weights."""
    problems = []
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    if decoder.tie_word_embeddings and head in folder.tensors and (
            digest(hf_parts(folder, head, PIECE)) != digest(hf_parts(folder, embedding, PIECE))):
        problems.append(f"{head} is not {embedding}, but config.json says tie_word_embeddings = true")
    for layer in range(decoder.num_hidden_layers, decoder.num_hidden_layers + decoder.mtp_layers):
        prefix = f"model.layers.{layer}."
        if any(name.startswith(prefix) for name in folder.tensors) and f"{prefix}eh_proj.weight" not in folder.tensors:
            problems.append(f"{prefix}* is no layer for multi-token prediction, as it lacks {prefix}eh_proj.weight, "
                            f"but config.json says num_hidden_layers = {decoder.num_hidden_layers}")
    return problems


def _overlaps(unit: Unit, rows: slice) -> Iterator[tuple[str, slice]]:
    """Hugging Face name, and which of these rows of the unit are its; in order."""
    for piece in unit.pieces:
        if held := _held(piece, rows):
            start, step = piece.local_index[0].start - rows.start, _step(piece)
            yield piece.hf_name, slice(start + held[0] * step, start + held[-1] * step + 1, step)


def _hf_indices(unit: Unit, rows: slice) -> Iterator[tuple[slice, ...]]:
    """For each of `_overlaps`, where in the Hugging Face tensor the rows are."""
    for piece in unit.pieces:
        if held := _held(piece, rows):
            start = piece.hf_index[0].start
            yield (slice(start + held[0], start + held[-1] + 1), *piece.hf_index[1:])


def _held(piece: Piece, rows: slice) -> range:
    """Which of a piece's rows, by their number in it, are these rows of its unit."""
    place, step = piece.local_index[0], _step(piece)
    return range(max(0, -((place.start - rows.start) // step)),
                 -((place.start - min(place.stop, rows.stop)) // step))


def _step(piece: Piece) -> int:
    """Of its rows in the unit."""
    return piece.local_index[0].step or 1


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

"""Checkpoint → the same checkpoint in other files: one for each rank of a layout, or any number of equal ones.

Nothing is left out: optimizer state goes where its weights go, and what belongs to no weight is spread over all files.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from megatron_pbsd.boxes import Box
from megatron_pbsd.checkpointing.conversion.locate import (
    TRACKER,
    changed_index,
    locate,
    model_config,
    recorded,
    write_checksums,
)
from megatron_pbsd.checkpointing.conversion.plan import (
    Digests,
    Meter,
    balanced,
    box_steps,
    digests_path,
    read_digests,
    require,
    snapshot,
    write_digests,
)
from megatron_pbsd.checkpointing.conversion.to_hf import PADDED, WEIGHTS
from megatron_pbsd.checkpointing.errors import CheckpointError
from megatron_pbsd.checkpointing.hf_folder import CHECKSUMS
from megatron_pbsd.checkpointing.torch_dist import SUFFIX, Reader, Writer, assemble, listed
from megatron_pbsd.checkpointing.torch_dist_index import BACKEND, METADATA
from megatron_pbsd.config import ParallelConfig
from megatron_pbsd.models import family
from megatron_pbsd.models.dist_checkpoint import has_layer_axis, rank_boxes
from megatron_pbsd.models.errors import ModelError

Part = tuple[str, Box]


@dataclass(frozen=True)
class Reshard:
    """source: a checkpoint. layout: a file for each rank that speaks for some weights; None: `count` files.
    config: folder of the model's configuration, which only a layout needs; None: the one that it keeps itself."""

    source: Path
    layout: ParallelConfig | None = None
    count: int = 1
    config: Path | None = None
    piece_bytes: int = 128 << 20

    @property
    def inner(self) -> str:
        return self._folder.name if (self.source / TRACKER).is_file() else ""

    def problems(self) -> list[str]:
        try:
            problems = changed_index(self._folder) + self._reader.incomplete()
            if self.layout is not None:
                hf = model_config(self._folder, self.config)[0]
                problems += family(hf).layout_problems(hf, self.layout)
        except (CheckpointError, ModelError) as error:
            return [str(error)]
        return problems

    def identity(self) -> dict[str, Any]:
        return {"conversion": "reshard", "layout": self.layout and self.layout.model_dump(), "files": self.count,
                "source": snapshot(self._folder)}

    def sections(self) -> dict[str, int]:
        return {name: sum(map(self._nbytes, parts)) for name, parts in self._plan.items()}

    def write(self, folder: Path, name: str, done: Callable[[int], None]) -> None:
        meter, digests, writer = Meter(done, self._reader), Digests(), Writer(folder, name)
        for key, box in self._plan[name]:
            tensor = self._reader.tensors[key]
            for step in box_steps(box, tensor.dtype.itemsize, self.piece_bytes):
                part = self._reader.read(key, step)
                digests.update(_id(key, box), part)
                writer.tensor(key, tensor.shape, [s.start for s in step], part)
                meter(part.nbytes)
        if name == next(iter(self._plan)):
            intact = set()  # most objects are the same empty one
            for key, entry in self._reader.objects.items():
                saved = bytes(self._reader.saved_object(key))
                if saved not in intact and not self._reader.intact(entry):
                    raise CheckpointError(f"{self._folder / entry.file}: {key} is damaged")
                intact.add(saved)
                writer.saved_object(key, saved)
        writer.close()
        write_digests(folder, name, digests.hex())

    def check(self, folder: Path, name: str, done: Callable[[int], None]) -> list[str]:
        reader = Reader(folder, listed(folder, name)[1], checked=True)
        meter, found = Meter(done, reader), Digests()
        for key, box in self._plan[name]:
            for step in box_steps(box, self._reader.tensors[key].dtype.itemsize, self.piece_bytes):
                part = reader.read(key, step)
                found.update(_id(key, box), part)
                meter(part.nbytes)
        wanted = read_digests(folder, [name])
        objects = self._reader.objects if name == next(iter(self._plan)) else ()
        lost = [key for key in objects if key not in reader.objects
                or reader.saved_object(key) != self._reader.saved_object(key)]
        reader.forget()
        return [f"{folder / name}: {part} is not what was read" for part in (*found.differing(wanted), *lost)]

    def discard(self, folder: Path, name: str) -> None:
        for path in (digests_path(folder, name), *folder.glob(f"{name}.*")):
            path.unlink(missing_ok=True)

    def finish(self, folder: Path) -> None:
        files = assemble(folder, list(self._plan))
        written = Reader(folder)
        require(written.incomplete())
        kinds = {key: (tensor.shape, tensor.dtype) for key, tensor in self._reader.tensors.items()}
        if {key: (tensor.shape, tensor.dtype) for key, tensor in written.tensors.items()} != kinds:
            raise CheckpointError(f"{folder} has not all tensors of {self._folder}")
        for path in self._folder.iterdir():
            if path.is_dir():
                shutil.copytree(path, folder / path.name, dirs_exist_ok=True)
            elif path.suffix != SUFFIX and path.name not in (METADATA, BACKEND, CHECKSUMS):
                shutil.copyfile(path, folder / path.name)
        write_checksums(folder, files, recorded(self._folder)["tensors"])
        if self.inner:
            shutil.copyfile(self.source / TRACKER, folder.parent / TRACKER)
        for name in self._plan:
            digests_path(folder, name).unlink()

    def damage(self) -> list[str]:
        return self._reader.damaged()

    @cached_property
    def _folder(self) -> Path:
        return locate(self.source)

    @cached_property
    def _reader(self) -> Reader:
        return Reader(self._folder, checked=True)

    @cached_property
    def _plan(self) -> dict[str, list[Part]]:
        """File → what goes into it."""
        stored = [(key, part.box) for key, tensor in self._reader.tensors.items() for part in tensor.parts]
        if self.layout is None:
            sizes = list(map(self._nbytes, stored))
            groups = balanced(stored, sizes, -(-sum(sizes) // self.count))
        else:
            groups = [list(self._of_rank(rank)) for rank in range(self.layout.world_size)]
            placed = {key for group in groups for key, _ in group}
            self._add_padding(groups)
            loads = [sum(map(self._nbytes, group)) for group in groups]
            # What belongs to no weight goes where there is least, among the ranks that have something.
            for part in stored:
                if part[0] not in placed:
                    least = min((i for i, group in enumerate(groups) if group), key=loads.__getitem__, default=0)
                    groups[least].append(part)
                    loads[least] += self._nbytes(part)
        return {f"__{i}_0": group for i, group in enumerate(groups) if group}

    def _of_rank(self, rank: int) -> Iterator[Part]:
        """Weights, and the optimizer's tensors of the same shape, whose keys end like theirs."""
        for key, box in rank_boxes(self._decoder, self.layout, rank, has_layer_axis(self._reader.tensors)):
            for follower in self._followers.get(key, ()):
                yield follower, box

    @cached_property
    def _decoder(self) -> Any:
        hf = model_config(self._folder, self.config)[0]
        return family(hf).decoder(hf)

    @cached_property
    def _followers(self) -> dict[str, list[str]]:
        """Weight → tensors that are divided like it, itself included."""
        found: dict[str, list[str]] = {}
        for key in self._reader.tensors:
            weight = next((key[key.index(start):] for start in WEIGHTS if start in key), key)
            held = self._reader.tensors.get(weight)
            if held is not None and held.shape == self._reader.tensors[key].shape:
                found.setdefault(weight, []).append(key)
        return found

    def _add_padding(self, groups: list[list[Part]]) -> None:
        """Rows beyond the vocabulary go to the rank that has its last ones."""
        for weight in PADDED:
            for key in self._followers.get(weight, ()):
                rows, *rest = self._reader.tensors[key].shape
                last = max((box[0].stop, i) for i, group in enumerate(groups) for k, box in group if k == key)
                if last[0] < rows:
                    groups[last[1]].append((key, (slice(last[0], rows), *(slice(0, n) for n in rest))))

    def _nbytes(self, part: Part) -> int:
        key, box = part
        return prod(s.stop - s.start for s in box) * self._reader.tensors[key].dtype.itemsize


def _id(key: str, box: Box) -> str:
    return f"{key} at {tuple(s.start for s in box)}"

"""Examines a checkpoint of a run: its files, the bytes of its tensors, and whether these have all their elements."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from math import prod
from pathlib import Path

from megatron_pbsd.checkpointing.errors import CheckpointError, named
from megatron_pbsd.checkpointing.manifest import Manifest, file_problems, read_manifest
from megatron_pbsd.checkpointing.torch_dist import BACKEND, Entry, Reader, intersection

LEARNER = "learner"
"""Folder in a checkpoint of a run that holds the learner's distributed checkpoint."""


def verify(checkpoint: Path) -> Manifest:
    """Compare every file with the manifest. CheckpointError naming each that differs, and the tensors in it."""
    manifest = read_manifest(checkpoint)
    problems = _whereabouts(checkpoint, manifest) + _damage(checkpoint, manifest)
    if problems:
        raise CheckpointError("; ".join(problems))
    return manifest


def examine(checkpoint: Path) -> list[str]:
    """All that is wrong, one sentence each: besides `verify`, each tensor's own checksum, and its missing and repeated
    elements. Empty when the checkpoint is complete and right."""
    try:
        manifest = read_manifest(checkpoint)
    except CheckpointError as error:
        return [str(error)]
    problems = _whereabouts(checkpoint, manifest) + _damage(checkpoint, manifest)
    folder = checkpoint / LEARNER
    if (folder / BACKEND).is_file():
        try:
            reader = Reader(folder)
            problems += gaps(reader)
            if not problems:
                problems += [f"{damaged} is damaged" for damaged in reader.damaged()]
        except CheckpointError as error:
            problems.append(str(error))
    return list(dict.fromkeys(problems))


def gaps(reader: Reader) -> list[str]:
    """What keeps the index from covering every element of every tensor exactly once, with parts that are there."""
    problems = []
    sizes = {path.name: path.stat().st_size for path in reader.folder.iterdir()}
    for key, stored in reader.tensors.items():
        named = f"{reader.folder}: {key} {list(stored.shape)}"
        for part in stored.parts:
            if any(s.stop > n for s, n in zip(part.box, stored.shape)) or len(part.box) != len(stored.shape):
                problems.append(f"{named} has a part at {part.offset} of size {part.size} in {part.file}, outside it")
        for a, b in _overlapping(stored.parts):
            problems.append(
                f"{named} has the same elements twice: at {a.offset} in {a.file}, at {b.offset} in {b.file}")
        missing = prod(stored.shape) - sum(prod(part.size) for part in stored.parts)
        if missing > 0:
            problems.append(f"{named} lacks {missing} of {prod(stored.shape)} elements")
    for file, parts in _by_file(reader).items():
        end = max(part.start + part.length for part in parts)
        if sizes.get(file, 0) < end:
            problems.append(f"{reader.folder / file} " + (
                f"has {sizes[file]} bytes, its parts end at {end}" if file in sizes else "is missing")
                + _holding([p.key for p in parts if p.start + p.length > sizes.get(file, 0)]))
    return problems


def _overlapping(parts: Sequence[Entry]) -> Iterator[tuple[Entry, Entry]]:
    """Pairs of parts that share elements; the cells of a grid, which parts usually are, need no comparing."""
    if len({part.offset for part in parts}) == len(parts) and _is_grid(parts):
        return
    for a, b in combinations(parts, 2):
        if intersection(a.box, b.box) is not None:
            yield a, b


def _is_grid(parts: Sequence[Entry]) -> bool:
    """Whether all have the same size and begin at its multiples."""
    size = parts[0].size
    return all(part.size == size and all(o % n == 0 for o, n in zip(part.offset, size, strict=True) if n)
               for part in parts)


def _by_file(reader: Reader) -> dict[str, list[Entry]]:
    files: dict[str, list[Entry]] = {}
    for entry in (*(part for stored in reader.tensors.values() for part in stored.parts), *reader.objects.values()):
        files.setdefault(entry.file, []).append(entry)
    return files


def _whereabouts(checkpoint: Path, manifest: Manifest) -> list[str]:
    expected = f"step_{manifest.step}"
    named = checkpoint.resolve().name
    return [] if named == expected else [f"{checkpoint} is called {named}, but its manifest is of {expected}"]


def _damage(checkpoint: Path, manifest: Manifest) -> list[str]:
    """Files that are not what was written, each with the tensors that this concerns."""
    problems = file_problems(checkpoint, manifest)
    if not problems:
        return []
    tensors = _damaged_tensors(checkpoint / LEARNER)
    return [message + _holding(tensors.get(name, [])) for name, message in problems.items()]


def _damaged_tensors(folder: Path) -> dict[str, list[str]]:
    """Path inside the checkpoint → what in that file is damaged; empty when the index itself is."""
    try:
        reader = Reader(folder)
    except CheckpointError:
        return {}
    return {f"{LEARNER}/{file}": [entry.key for entry in parts if not reader.intact(entry)]
            for file, parts in _by_file(reader).items()}


def _holding(keys: Sequence[str]) -> str:
    """`, in A, B and 7 others`."""
    return f", in {named(keys)}" if keys else ""

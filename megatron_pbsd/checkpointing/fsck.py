"""Examines a checkpoint of a run: its files, the bytes of its tensors, and whether these have all their elements."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_pbsd.checkpointing.errors import CheckpointError, named
from megatron_pbsd.checkpointing.manifest import Manifest, file_problems, read_manifest
from megatron_pbsd.checkpointing.torch_dist import Reader
from megatron_pbsd.checkpointing.torch_dist_index import BACKEND, Entry

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
                problems += reader.damaged()
        except CheckpointError as error:
            problems.append(str(error))
    return list(dict.fromkeys(problems))


def gaps(reader: Reader) -> list[str]:
    """What keeps the index from covering every element of every tensor exactly once, with parts that are there."""
    problems = reader.incomplete()
    sizes = {path.name: path.stat().st_size for path in reader.folder.iterdir()}
    for file, parts in _by_file(reader).items():
        end = max(part.start + part.length for part in parts)
        if sizes.get(file, 0) < end:
            problems.append(f"{reader.folder / file} " + (
                f"has {sizes[file]} bytes, its parts end at {end}" if file in sizes else "is missing")
                + _holding([p.key for p in parts if p.start + p.length > sizes.get(file, 0)]))
    return problems


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

"""What a checkpoint of a run says of itself: manifest.json, written last and checked first."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import xxhash

from megatron_pbsd.checkpointing.errors import CheckpointError
from megatron_pbsd.checkpointing.files import write_synced

MANIFEST = "manifest.json"
FORMAT = 1
CHUNK = 1 << 22


@dataclass(frozen=True)
class Contents:
    """What is saved, in the words of whoever saves it.

    layout:    the writer's parallel layout.
    metrics:   of the step: what the best checkpoint is chosen by.
    position:  where in its data the run is; see `prompts.position`.
    """

    step: int
    layout: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    position: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class FileRecord:
    """size in bytes, xxh3_128 of the content in hex."""

    size: int
    checksum: str


@dataclass(frozen=True)
class Manifest:
    """written: seconds since the epoch. files: path inside the checkpoint → record."""

    contents: Contents
    written: float
    files: dict[str, FileRecord]

    @property
    def step(self) -> int:
        return self.contents.step

    @property
    def nbytes(self) -> int:
        return sum(record.size for record in self.files.values())


def write_manifest(checkpoint: Path, manifest: Manifest) -> None:
    """To disk, with a checksum of its own: a step or a checksum that changes later is noticed too."""
    body = {"format": FORMAT, **asdict(manifest)}
    write_synced(checkpoint / MANIFEST, json.dumps({"checksum": _digest(body), **body}, indent=1).encode())


def read_manifest(checkpoint: Path) -> Manifest:
    """CheckpointError when the manifest is missing, damaged or of another format."""
    path = checkpoint / MANIFEST
    try:
        body = json.loads(path.read_text())
        written = body.pop("checksum")
        version = body.pop("format")
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    if written != _digest({"format": version, **body}):
        raise CheckpointError(f"{path} is damaged: its content is not what its checksum was taken of")
    if version != FORMAT:
        raise CheckpointError(f"{path}: format = {version!r} is not implemented; this version reads format {FORMAT}")
    return Manifest(
        Contents(**{f.name: body["contents"][f.name] for f in fields(Contents)}), body["written"],
        {name: FileRecord(**record) for name, record in body["files"].items()})


def file_problems(checkpoint: Path, manifest: Manifest) -> dict[str, str]:
    """Path inside the checkpoint → what is wrong with the file, for each that is not as the manifest has it."""
    problems = {}
    for name, record in manifest.files.items():
        path = checkpoint / name
        try:
            size = path.stat().st_size
            if size != record.size:
                problems[name] = f"{path} has {size} bytes, {record.size} were written"
            elif checksum(path) != record.checksum:
                problems[name] = f"{path} is damaged: its checksum differs from the manifest's"
        except FileNotFoundError:
            problems[name] = f"{path} is missing"
        except OSError as error:
            problems[name] = f"{path} cannot be read: {error}"
    for path in files_in(checkpoint):
        name = str(path.relative_to(checkpoint))
        if name not in manifest.files and name != MANIFEST:
            problems[name] = f"{path} is not in the manifest"
    return problems


def files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def checksum(path: Path) -> str:
    """xxh3_128 in hex."""
    return _hashed(iter_chunks(path))


def iter_chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(CHUNK):
            yield chunk


def _digest(body: dict[str, Any]) -> str:
    return _hashed([json.dumps(body, sort_keys=True).encode()])


def _hashed(chunks: Iterator[bytes] | list[bytes]) -> str:
    digest = xxhash.xxh3_128()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()

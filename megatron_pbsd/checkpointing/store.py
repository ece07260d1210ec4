"""Checkpoints on disk: all or nothing, verified, and only the newest few.

    <folder>/step_40/…              files of whoever took part, and manifest.json with their sizes and checksums
    <folder>/step_60.partial/…      being written, or left by a run that died
    <folder>/latest                 name of the newest complete checkpoint
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_pbsd.checkpointing.errors import CheckpointError

MANIFEST = "manifest.json"
LATEST = "latest"
PARTIAL = ".partial"
FULL_BELOW = 1 << 20
"""Bytes of free space under which a failed write is put down to a full disk."""


@dataclass(frozen=True)
class FileRecord:
    """size in bytes, 128-bit BLAKE2b of the content in hex."""

    size: int
    checksum: str


@dataclass(frozen=True)
class Manifest:
    """layout: what the writer says of its parallel layout. files: path inside the checkpoint → record."""

    step: int
    layout: dict[str, Any]
    files: dict[str, FileRecord]


class CheckpointStore:
    """folder: where checkpoints live. keep: how many complete ones stay."""

    def __init__(self, folder: str | Path, keep: int):
        self.folder, self.keep = Path(folder), keep

    @contextmanager
    def writing(self, step: int, layout: dict[str, Any], expected_bytes: int) -> Iterator[Path]:
        """A folder to write into; when the block ends without an error it becomes the newest checkpoint, at once.

        expected_bytes: estimate of what will be written; less free space is a CheckpointError before anything is.
        An error inside the block leaves the previous checkpoint the newest and removes what was written.
        """
        partial = self.folder / f"step_{step}{PARTIAL}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._require_space(expected_bytes)
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            yield partial
            self._commit(partial, step, layout)
        except Exception as error:
            free = shutil.disk_usage(self.folder).free
            shutil.rmtree(partial, ignore_errors=True)
            # Ranks in other processes report a full disk in wrappings of their own; the disk itself does not lie.
            full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
            if (full or free < FULL_BELOW) and not isinstance(error, CheckpointError):
                raise CheckpointError(
                    f"{self.folder}: the disk is full: a checkpoint needs about {expected_bytes} bytes, {free} were "
                    f"free when writing failed ({error})") from error
            raise
        self._retain()

    def newest(self) -> Path | None:
        """The newest complete checkpoint, its files verified; None when there is none.

        CheckpointError naming every file that is missing, damaged or not in the manifest.
        """
        pointer = self.folder / LATEST
        if pointer.is_file():
            path = self.folder / pointer.read_text().strip()
            if not path.is_dir():
                raise CheckpointError(f"{pointer} names {path.name}, which does not exist in {self.folder}; "
                                      f"have {[p.name for p in self._complete()]}")
        else:
            path = max(self._complete(), key=_step, default=None)
        if path is not None:
            verify(path)
        return path

    def _commit(self, partial: Path, step: int, layout: dict[str, Any]) -> None:
        files = {}
        for path in _files(partial):
            files[str(path.relative_to(partial))] = FileRecord(path.stat().st_size, checksum(path))
            _sync(path)
        _write(partial / MANIFEST, json.dumps(asdict(Manifest(step, layout, files)), indent=1))
        for folder in (*(p for p in partial.rglob("*") if p.is_dir()), partial):
            _sync(folder)
        final = self.folder / f"step_{step}"
        if final.exists():
            final.rename(self.folder / f"step_{step}.replaced{PARTIAL}")
        partial.rename(final)
        temporary = self.folder / f"{LATEST}.new"
        _write(temporary, final.name + "\n")
        temporary.replace(self.folder / LATEST)
        _sync(self.folder)

    def _retain(self) -> None:
        for path in sorted(self._complete(), key=lambda p: (p / MANIFEST).stat().st_mtime_ns)[: -self.keep]:
            shutil.rmtree(path)
        for path in self.folder.glob(f"step_*{PARTIAL}"):
            shutil.rmtree(path)

    def _complete(self) -> list[Path]:
        return [p for p in self.folder.glob("step_*") if re.fullmatch(r"step_\d+", p.name)]

    def _require_space(self, needed: int) -> None:
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise CheckpointError(
                f"{self.folder}: a checkpoint needs about {needed} bytes, {free} are free; free some space, point "
                "'runs' elsewhere, or lower checkpoint.keep")


def read_manifest(checkpoint: Path) -> Manifest:
    """CheckpointError when the manifest is missing or cannot be read."""
    path = checkpoint / MANIFEST
    try:
        raw = json.loads(path.read_text())
        return Manifest(raw["step"], raw["layout"], {n: FileRecord(**r) for n, r in raw["files"].items()})
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def verify(checkpoint: Path) -> Manifest:
    """Compare every file with the manifest. CheckpointError naming each one that differs."""
    manifest = read_manifest(checkpoint)
    problems = []
    for name, record in manifest.files.items():
        path = checkpoint / name
        if not path.is_file():
            problems.append(f"{path} is missing")
        elif path.stat().st_size != record.size:
            problems.append(f"{path} has {path.stat().st_size} bytes, {record.size} were written")
        elif checksum(path) != record.checksum:
            problems.append(f"{path} is damaged: its checksum differs from the manifest's")
    if problems:
        raise CheckpointError("; ".join(problems))
    return manifest


def checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def _write(path: Path, text: str) -> None:
    path.write_text(text)
    _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

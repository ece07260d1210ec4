"""The CPU transport: one shared-memory file that learner ranks write and engines read."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path

import torch

from megatron_pbsd.resharding.manifest import WeightsManifest, view

ROOT = Path("/dev/shm")


class Segment:
    """Owns a segment of `nbytes` zeros until `close`; others attach to it by the manifest's `segment`."""

    def __init__(self, nbytes: int):
        _sweep()
        handle, path = tempfile.mkstemp(prefix=f"pbsd-{os.getpid()}-", dir=ROOT)
        try:
            os.posix_fallocate(handle, 0, max(nbytes, 1))   # fails here when memory is short, not with SIGBUS later
        finally:
            os.close(handle)
        self.name = Path(path).name

    def close(self) -> None:
        (ROOT / self.name).unlink(missing_ok=True)


class SharedFolder:
    """Owns an empty folder in shared memory until `close`; what others leave there goes with it."""

    def __init__(self) -> None:
        _sweep()
        self.path = tempfile.mkdtemp(prefix=f"pbsd-{os.getpid()}-", dir=ROOT)

    def close(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def __enter__(self) -> SharedFolder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def attach(manifest: WeightsManifest) -> dict[str, torch.Tensor]:
    """The manifest's tensors as views into the segment; unmapped when the last of them is gone.

    ValueError when the segment is gone or too short.
    """
    flat = mapped(manifest.segment, manifest.nbytes)
    return {entry.name: view(flat, entry) for entry in manifest.entries}


def mapped(segment: str, nbytes: int) -> torch.Tensor:
    """The first bytes of a segment, uint8 [nbytes]. ValueError when it is gone or too short."""
    path = ROOT / segment
    if not path.is_file():
        raise ValueError(f"shared-memory segment {segment!r} does not exist")
    size = path.stat().st_size
    if size < nbytes:
        raise ValueError(f"shared-memory segment {segment!r} has {size} bytes, expected {nbytes}")
    return torch.from_file(str(path), shared=True, size=nbytes, dtype=torch.uint8)


def _sweep() -> None:
    """Remove segments and folders whose owner was killed before it could."""
    for path in ROOT.glob("pbsd-*"):
        owner = re.match(r"pbsd-(\d+)-", path.name)
        if not owner or Path(f"/proc/{owner[1]}").exists():
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

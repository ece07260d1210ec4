"""The CPU transport: one shared-memory file that learner ranks write and engines read."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch

from megatron_pbsd.resharding.manifest import WeightsManifest, view
from megatron_pbsd.resharding.shared_folder import ROOT, sweep


class Segment:
    """Owns a segment of `nbytes` zeros until `close`; others attach to it by the manifest's `segment`."""

    def __init__(self, nbytes: int):
        sweep()
        handle, path = tempfile.mkstemp(prefix=f"pbsd-{os.getpid()}-", dir=ROOT)
        try:
            os.posix_fallocate(handle, 0, max(nbytes, 1))   # fails here when memory is short, not with SIGBUS later
        finally:
            os.close(handle)
        self.name = Path(path).name

    def close(self) -> None:
        (ROOT / self.name).unlink(missing_ok=True)


def attach(manifest: WeightsManifest) -> dict[str, torch.Tensor]:
    """The manifest's tensors as views into the segment; unmapped when the last of them is gone.

    ValueError when the segment is gone or too short.
    """
    flat = mapped(manifest.segment, manifest.nbytes)
    return {entry.name: view(flat, entry) for entry in manifest.entries}


class Mappings:
    """As `attach`, of segments that are mapped once, until `close`: to map one again costs as much as to read it."""

    def __init__(self) -> None:
        self._flat: dict[str, torch.Tensor] = {}

    def tensors(self, manifest: WeightsManifest) -> dict[str, torch.Tensor]:
        if len(self._flat.get(manifest.segment, ())) < manifest.nbytes:
            self._flat[manifest.segment] = mapped(manifest.segment, manifest.nbytes)
        return {entry.name: view(self._flat[manifest.segment], entry) for entry in manifest.entries}

    def close(self) -> None:
        self._flat.clear()


def mapped(segment: str, nbytes: int) -> torch.Tensor:
    """A whole segment, uint8 [at least nbytes]. ValueError when it is gone or too short."""
    path = ROOT / segment
    if not path.is_file():
        raise ValueError(f"shared-memory segment {segment!r} does not exist")
    size = path.stat().st_size
    if size < nbytes:
        raise ValueError(f"shared-memory segment {segment!r} has {size} bytes, expected {nbytes}")
    return torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)

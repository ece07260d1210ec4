"""Where the published weights lie: one flat buffer and the place of each HF-named tensor in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TensorEntry:
    """offset: bytes from the start of the buffer. dtype: torch name without prefix, e.g. 'float32'."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        count = 1
        for n in self.shape:
            count *= n
        return count * getattr(torch, self.dtype).itemsize


@dataclass(frozen=True)
class WeightsManifest:
    """segment: name of the shared-memory segment (resharding.shared_memory) that holds `entries`, in order.

    nbytes: where the last of them ends, alignment gaps included.
    """

    segment: str
    entries: tuple[TensorEntry, ...]
    nbytes: int

    @property
    def described(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Tensor → dtype, shape."""
        return {entry.name: (entry.dtype, tuple(entry.shape)) for entry in self.entries}


ALIGNMENT = 64


def layout(
    segment: str, tensors: Mapping[str, tuple[str, tuple[int, ...]]], start: int = 0, alignment: int = ALIGNMENT
) -> WeightsManifest:
    """Give each tensor (name → dtype, shape) its aligned place, the first at byte `start`."""
    entries, offset = [], start
    for name, (dtype, shape) in tensors.items():
        entry = TensorEntry(name, dtype, tuple(shape), offset)
        entries.append(entry)
        offset += -(-entry.nbytes // alignment) * alignment
    return WeightsManifest(segment, tuple(entries), offset)


def view(flat: torch.Tensor, entry: TensorEntry) -> torch.Tensor:
    """The entry's part of the buffer `flat` (uint8 [nbytes]) as a tensor that shares its memory."""
    return flat[entry.offset : entry.offset + entry.nbytes].view(getattr(torch, entry.dtype)).view(entry.shape)

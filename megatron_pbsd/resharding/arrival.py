"""What an engine is handed for each bucket, and the tensors that it then has, in a process of ours.

SGLang's processes have readers of their own (rollout/engines/sglang).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace

import torch
import torch.multiprocessing
from safetensors import SafetensorError, safe_open

from megatron_pbsd.platform.process_group import GroupPlace, WeightsGroup
from megatron_pbsd.resharding.manifest import WeightsManifest
from megatron_pbsd.resharding.shared_memory import Mappings
from megatron_pbsd.resharding.stream import tensors_in


@dataclass(frozen=True)
class Broadcast:
    """A bucket that rank 0 of the group will send as one tensor of bytes. manifest: of no segment; where tensors lie in
    it, without gaps."""

    group: str
    manifest: WeightsManifest


@dataclass(frozen=True)
class Scattered:
    """A bucket of which rank 0 of the group will send each other rank its shares alone, end to end (shares.py).
    manifest: of no segment; of the whole bucket. For engines whose `join_group` says how they divide the model."""

    group: str
    manifest: WeightsManifest


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file. names: of the tensors in it that are meant, all of them."""

    path: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Mapped:
    """A bucket in another process's memory. payloads: one for each of the engine's ranks, each to be opened once.
    manifest: of no segment; where tensors lie in it."""

    payloads: tuple[bytes, ...]
    manifest: WeightsManifest


def payload(flat: torch.Tensor, manifest: WeightsManifest) -> bytes:
    """A handle of this memory for one process of the same machine, and where the manifest's tensors lie in it, as
    SGLang's /update_weights_from_tensor takes flattened buckets. CUDA's own handles of memory on a GPU."""
    about = [SimpleNamespace(
        name=e.name, shape=tuple(e.shape), dtype=getattr(torch, e.dtype), start_idx=e.offset,
        end_idx=e.offset + e.nbytes, numel=e.nbytes) for e in manifest.entries]
    strategy = torch.multiprocessing.get_sharing_strategy()
    # The other, of file descriptors, is for relatives of this process alone.
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        return bytes(ForkingPickler.dumps({"flattened_tensor": flat, "metadata": about}))
    finally:
        torch.multiprocessing.set_sharing_strategy(strategy)


Arriving = WeightsManifest | Broadcast | Scattered | TensorFile | Mapped
"""A manifest: they lie in shared memory."""


def names_of(bucket: Arriving) -> tuple[str, ...]:
    if isinstance(bucket, TensorFile):
        return bucket.names
    manifest = bucket if isinstance(bucket, WeightsManifest) else bucket.manifest
    return tuple(entry.name for entry in manifest.entries)


class Arrivals:
    """Keeps what arrives open between buckets. device: that collectives need."""

    def __init__(self, device: torch.device):
        self._device = device
        self._mappings = Mappings()
        self._group: WeightsGroup | None = None
        self._joined = ""

    def join(self, place: GroupPlace, rank: int) -> None:
        self.leave()
        self._group, self._joined = WeightsGroup(place, rank), place.name

    def leave(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            group.close()

    def tensors(self, bucket: Arriving) -> Mapping[str, torch.Tensor]:
        """ValueError when they cannot be had."""
        if isinstance(bucket, WeightsManifest):
            return self._mappings.tensors(bucket)
        if isinstance(bucket, TensorFile):
            return read(bucket)
        if isinstance(bucket, Mapped):
            return tensors_in(ForkingPickler.loads(bucket.payloads[0])["flattened_tensor"], bucket.manifest.entries)
        if self._group is None or self._joined != bucket.group:
            raise ValueError(f"weights are sent in group {bucket.group!r}, which this engine has not joined")
        flat = torch.empty(bucket.manifest.nbytes, dtype=torch.uint8, device=self._device)
        try:
            self._group.broadcast(flat).wait()
        except RuntimeError as error:  # torch's, of whatever backend
            raise ValueError(f"nothing came in group {bucket.group!r}: {error}") from error
        return tensors_in(flat, bucket.manifest.entries)

    def ended(self) -> None:
        """Nothing more comes for now."""
        self._mappings.close()


def read(file: TensorFile) -> dict[str, torch.Tensor]:
    try:
        with safe_open(file.path, "pt") as tensors:
            return {name: tensors.get_tensor(name) for name in file.names}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file.path} cannot be read: {error}") from error

"""Gives the device memory of a learner rank away between its phases, and takes it back.

Storages are emptied in place: parameters, Megatron's contiguous buffers, the views into them, hooks and param groups
stay the objects they are. Megatron-core 0.16.1 has helpers of its own. `DistributedDataParallel.offload_grad_buffers`
does the same as this for gradients, and nothing else; `MegatronOptimizer.offload_to_cpu` gives every optimized tensor
new memory, which for float32 parameters ends their being views of the buffer that is all-gathered.

Addresses change: CUDA graphs, fp8 parameters and buffers registered with NCCL hold the old ones.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from megatron_pbsd.learner.categories import CATEGORIES
from megatron_pbsd.learner.errors import LearnerError
from megatron_pbsd.learner.optimizer_state import parts
from megatron_pbsd.platform.usage import give_back_freed

PIECE_BYTES = 1 << 28
"""Host copies are made in pieces: torch rounds each pinned allocation up to a power of two."""


class DeviceMemory:
    """What `chunks`, the model parts of one rank, and their optimizer hold on their device.

    Releasing and regaining communicators is a collective operation: all ranks do it alike.
    """

    def __init__(self, chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer):
        self._chunks, self._optimizer = list(chunks), optimizer
        self._device = next(chunks[0].parameters()).device
        self._emptied: dict[str, list[Emptied]] = {}
        self._suspended = False
        self._phase = ""
        for chunk in self._chunks:
            if chunk.ddp_config.nccl_ub:
                raise LearnerError("gradient buffers that are registered with NCCL (nccl_ub) cannot be released")
            chunk.register_forward_pre_hook(self._before_forward)

    def account(self) -> dict[str, int]:
        """Bytes on the device now, by category. A storage that several tensors view counts once."""
        held = {name: 0 for name in CATEGORIES}
        for name, storage in self._storages():
            held[name] += storage.nbytes()
        held["communicators"] = 0 if self._suspended else sum(
            backend.memory_stats()["suspend"] for backend in _suspendable())
        return held

    def waiting(self) -> dict[str, int]:
        """Bytes of what is released that wait in host memory, by category."""
        return {name: sum(emptied.waiting for emptied in storages) for name, storages in self._emptied.items()}

    def release(self, phase: str, keep: Collection[str] = ()) -> dict[str, int]:
        """Empty all categories but `keep`; bytes given back to the device, by category. May be called again for more.

        Gradients are dropped; what else is released waits in host memory, pinned if the device is a GPU.
        phase:  what the device is for meanwhile; errors name it.
        LearnerError for a category that does not exist.
        """
        _check(keep)
        released = {name: size for name, size in self.account().items() if name not in keep}
        self._phase = phase
        for name, storage in list(self._storages()):
            if name in released and storage.nbytes():
                self._emptied.setdefault(name, []).append(Emptied(storage, keep_values=name != "gradients"))
        if "communicators" in released and not self._suspended:
            for backend in _suspendable():
                backend.suspend()
            self._suspended = True
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        else:
            give_back_freed()
        return released

    def regain(self, categories: Collection[str] = CATEGORIES) -> None:
        """Inverse of `release`: the same values, but gradients are zero.

        When the device has too little memory torch's OutOfMemoryError is raised; what is missing then can be regained
        later.
        """
        _check(categories)
        if "communicators" in categories and self._suspended:
            for backend in _suspendable():
                backend.resume()
            self._suspended = False
        for name in categories:
            while self._emptied.get(name):
                self._emptied[name][-1].fill()
                self._emptied[name].pop()
            self._emptied.pop(name, None)

    def require(self, use: str, categories: Collection[str] = CATEGORIES) -> None:
        """LearnerError when any of `categories`, which `use` needs, is released. Torch itself would crash."""
        missing = [name for name in CATEGORIES if name in categories and (
            name in self._emptied or (name == "communicators" and self._suspended))]
        if missing:
            raise LearnerError(f"{use} needs {', '.join(missing)}, whose memory was released for {self._phase}")

    def _before_forward(self, module: torch.nn.Module, inputs: tuple[object, ...]) -> None:
        training = ("gradients",) if torch.is_grad_enabled() else ()
        self.require("the forward pass", ("parameters", "communicators", *training))

    def _storages(self) -> Iterator[tuple[str, torch.UntypedStorage]]:
        """Each storage on the device once, under the first category that has it."""
        seen: set[int] = set()
        for name, tensor in self._tensors():
            if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
                raise LearnerError(f"memory of a {type(tensor).__name__} among the {name} cannot be released")
            storage = tensor.untyped_storage()
            if tensor.device == self._device and storage._cdata not in seen:
                seen.add(storage._cdata)
                yield name, storage

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for chunk in self._chunks:
            for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]:
                if buffer.param_data is not None:
                    yield "parameters", buffer.param_data
                yield "gradients", buffer.grad_data
            for parameter in chunk.parameters():
                yield "parameters", parameter
                if parameter.grad is not None:
                    yield "gradients", parameter.grad
        for optimizer in (part.optimizer for part in parts(self._optimizer)):
            for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                yield "master_weights", parameter
                if parameter.grad is not None:
                    yield "gradients", parameter.grad
            for values in optimizer.state.values():
                for value in values.values():
                    if isinstance(value, torch.Tensor):
                        yield "optimizer_state", value


class Emptied:
    """A storage without memory and, with `keep_values`, its bytes on the host."""

    def __init__(self, storage: torch.UntypedStorage, keep_values: bool):
        self._storage, self._nbytes = storage, storage.nbytes()
        self._pieces = [
            torch.empty(len(part), dtype=torch.uint8, pin_memory=part.is_cuda).copy_(part, non_blocking=True)
            for part in _bytes(storage).split(PIECE_BYTES)] if keep_values else None
        if storage.device.type == "cuda":
            torch.cuda.synchronize()
        storage.resize_(0)

    @property
    def waiting(self) -> int:
        """Bytes on the host."""
        return sum(len(piece) for piece in self._pieces or ())

    def fill(self) -> None:
        self._storage.resize_(self._nbytes)
        whole = _bytes(self._storage)
        if self._pieces is None:
            whole.zero_()
        else:
            for part, piece in zip(whole.split(PIECE_BYTES), self._pieces, strict=True):
                part.copy_(piece, non_blocking=True)


def _bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _suspendable() -> list[dist.Backend]:
    """NCCL communicators that can give up their buffers (NCCL 2.29.7), in the order all ranks made them."""
    if not torch.cuda.is_available() or torch.cuda.nccl.version() < (2, 29, 7):
        return []
    return [group._get_backend(torch.device("cuda")) for group in dist.distributed_c10d._world.pg_map
            if dist.get_backend(group) == "nccl"]


def _check(categories: Collection[str]) -> None:
    unknown = [name for name in categories if name not in CATEGORIES]
    if unknown:
        raise LearnerError(f"no such categories of device memory: {unknown}; there are {', '.join(CATEGORIES)}")

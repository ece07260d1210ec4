"""Weights into and out of a model inside an SGLang server, through the server's own hook for such functions.

`--custom-weight-loader pbsd_weights.place …` makes them callable by /update_weights_from_tensor, whose `load_format`
names one. Such a function is handed the model and a list of named tensors; ours is one empty tensor whose name is what
is asked for, as JSON:

    {"segment": path of a file, "nbytes": its size, "entries": [[name, dtype, shape, offset], …], "report": path}

Every rank maps the file and takes its part of each tensor out of it, or writes it there. A function that raises ends
the server, so these report instead: `<report>.<rank>` holds

    {"problems": […], "tensors": [names that `place` was given], "dtypes": {those that this rank has a part of: dtype}}

Where a checkpoint's tensors lie in the model's (fused) parameters only the model's own `load_weights` knows. `place`
watches it while it copies nothing: each copy that it would have made pairs a part of a parameter with a part of a
checkpoint's tensor.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def place(model, named_tensors):
    """Find out where the file's tensors lie in the model's parameters. Comes before the others, once."""
    _reported(model, named_tensors, _place)


def load(model, named_tensors):
    """Copy the file's tensors into the model's parameters."""
    _reported(model, named_tensors, _load)


def read(model, named_tensors):
    """Copy the model's parameters into the file's tensors."""
    _reported(model, named_tensors, _read)


def _reported(model, named_tensors, act):
    request = json.loads(named_tensors[0][0])
    report = {"problems": [], "tensors": [], "dtypes": {}}
    try:
        report |= act(model, request)
    except Exception as error:
        report["problems"] = [f"{type(error).__name__}: {error}"]
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    with open(f"{request['report']}.{rank}", "w") as file:
        json.dump(report, file)


def _load(model, request):
    model.load_weights(list(_attached(request).items()))
    return {}


def _read(model, request):
    tensors = _attached(request)
    for piece in model.pbsd_pieces:
        piece.of(tensors[piece.name]).copy_(piece.parameter)
    return {}


def _place(model, request):
    # Storages of their own tell which tensor a part is of. They are never touched, and so take no memory.
    sources = {name: torch.empty(shape, dtype=getattr(torch, dtype)) for name, dtype, shape, _ in request["entries"]}
    copies = Copies(sources)
    problems = []
    try:
        with copies, torch.no_grad():
            model.load_weights(list(sources.items()))
    except Exception as error:
        problems.append(f"it refuses tensor {copies.last!r} or the one after it: "
                        f"{type(error).__name__}: {error}".rstrip(": "))
    model.pbsd_pieces = copies.pieces
    problems += copies.faults
    if not problems:
        # A parameter may be larger than what belongs there: sizes are rounded up for kernels.
        filled = {piece.parameter.untyped_storage().data_ptr() for piece in copies.pieces}
        problems = [f"nothing belongs into its {name!r}" for name, parameter in model.named_parameters()
                    if parameter.untyped_storage().data_ptr() not in filled]
    dtypes = {piece.name: str(piece.parameter.dtype).removeprefix("torch.") for piece in copies.pieces}
    return {"problems": problems, "tensors": list(sources), "dtypes": dtypes}


@dataclass
class Piece:
    """A part of a parameter, as a view, and the part of checkpoint tensor `name` that belongs there.

    offset: elements from the tensor's first one.
    """

    parameter: torch.Tensor
    name: str
    offset: int
    shape: tuple
    stride: tuple

    def of(self, tensor):
        return tensor.as_strided(self.shape, self.stride, tensor.storage_offset() + self.offset)


class Copies(TorchDispatchMode):
    """Records copies out of `sources` instead of making them. last: the tensor of the last one."""

    def __init__(self, sources):
        super().__init__()
        self._names = {tensor.untyped_storage().data_ptr(): name for name, tensor in sources.items()}
        self.pieces, self.faults, self.last = [], [], None

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.copy_.default:
            target, source = args[0], args[1]
            name = self._names.get(source.untyped_storage().data_ptr())
            if name is not None:
                self.last = name
                shape = tuple(source.shape)
                if target.shape == shape:
                    self.pieces.append(Piece(target, name, source.storage_offset(), shape, source.stride()))
                else:
                    self.faults.append(f"tensor {name!r}: a part {list(shape)} does not fit {list(target.shape)}")
                return target
        return function(*args, **(kwargs or {}))


def _attached(request):
    """Name → tensor that shares the file's memory."""
    flat = torch.from_file(request["segment"], shared=True, size=request["nbytes"], dtype=torch.uint8)
    tensors = {}
    for name, dtype, shape, offset in request["entries"]:
        kind = getattr(torch, dtype)
        end = offset + math.prod(shape) * kind.itemsize
        tensors[name] = flat[offset:end].view(kind).view(shape)
    return tensors


"""Weights into and out of a model inside an SGLang server, through the server's own hook for such functions.

`--custom-weight-loader pbsd_weights.place …` makes them callable by /update_weights_from_tensor, whose `load_format`
names one. Such a function is handed the model and a list of named tensors; ours is one empty tensor whose name is what
is asked for, as JSON:

    {"segment": path of a file, "nbytes": its size, "entries": [[name, dtype, shape, offset], …], "report": path}

Every rank maps the file and takes its part of each tensor out of it, or writes it there. A function that raises ends
the server, so these report instead: `<report>.<rank>` holds

    {"problems": […], "unplaced": [names of tensors that this rank has no part of]}

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
    report = {"problems": [], "unplaced": []}
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
    sources = {name: torch.empty_like(tensor) for name, tensor in _attached(request).items()}
    copies = Copies(sources)
    problems = []
    try:
        with copies, torch.no_grad():
            model.load_weights(list(sources.items()))
    except Exception as error:
        problems.append(f"the model refuses tensor {copies.last!r} or the one after it: "
                        f"{type(error).__name__}: {error}".rstrip(": "))
    model.pbsd_pieces = copies.pieces
    problems += copies.faults
    if not problems:
        problems = _faults(model, sources, copies.pieces)
    used = {piece.name for piece in copies.pieces}
    return {"problems": problems, "unplaced": [name for name in sources if name not in used]}


def _faults(model, sources, pieces):
    problems, filled = [], {}
    for piece in pieces:
        storage = piece.parameter.untyped_storage().data_ptr()
        filled[storage] = filled.get(storage, 0) + math.prod(piece.shape)
        expected, given = piece.parameter.dtype, sources[piece.name].dtype
        if expected != given:
            problems.append(f"tensor {piece.name!r} is {_name(given)}, expected {_name(expected)}")
    for name, parameter in model.named_parameters():
        found, size = filled.get(parameter.untyped_storage().data_ptr(), 0), parameter.numel()
        # Rows that round a vocabulary up are nobody's.
        padded = name.endswith(("embed_tokens.weight", "lm_head.weight"))
        if not found or (found < size and not padded):
            problems.append(f"tensors of the model's {name!r} are missing: {found} of {size} elements were published")
    return list(dict.fromkeys(problems))


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
                if target.shape != source.shape:
                    self.faults.append(f"tensor {name!r}: a part {list(source.shape)} does not fit {list(target.shape)}")
                else:
                    self.pieces.append(Piece(target, name, source.storage_offset(), tuple(source.shape), source.stride()))
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


def _name(dtype):
    return str(dtype).removeprefix("torch.")

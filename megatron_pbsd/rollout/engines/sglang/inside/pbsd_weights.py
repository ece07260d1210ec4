"""Weights into and out of a model inside an SGLang server, through the server's own hook for such functions.

`--custom-weight-loader pbsd_weights.place …` makes them callable by /update_weights_from_tensor, whose `load_format`
names one. Such a function is handed the model and a list of named tensors; ours is one empty tensor whose name is what
is asked for, as JSON:

    {"segment": path of a file, "nbytes": its size, "entries": [[name, dtype, shape, offset], …], "report": path}
    {"file": path of a safetensors file, "names": [of its tensors], "report": path}, for `load` and `take` too
    … "shares": [path of each rank's shares, [[tensor, box, parameter, place], …]], for `place`, or none
    … "group": name of a torch.distributed group, for `receive`
    … "names": [of tensors], "parts": path, for `read`; "names" alone, for `sums`

Every rank maps the file and takes its part of each tensor out of it. What it has of tensors it writes to
`<parts>.<rank>`: ranks on other machines cannot write into the same memory. A function that raises ends the server, so
these report instead: `<report>.<rank>` holds

    {"problems": […], "taken": bytes,
     "tensors": [names that `place` was given], "dtypes": {those that this rank has a part of: dtype},
     "otherwise": [how the model's own loader differs from the shares], "derives": whether `finish` has to be called,
     "parts": [[tensor, offset, shape, stride] of what `read` has written],
     "sums": [[tensor, offset, shape, stride, sum, sum of ones] of what this rank has (resharding/checksum.py)]}

Where a checkpoint's tensors lie in the model's (fused) parameters only the model's own `load_weights` knows. `place`
watches it while it copies nothing: each copy that it would have made pairs a part of a parameter with a part of a
checkpoint's tensor. These are compared with the shares that this project has planned for the rank, parameter[place] =
tensor[box]: when they are the same copies, `take` and `receive` make them, without that loader.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def place(model, named_tensors):
    """Find out where the file's tensors lie in the model's parameters. Comes before the others, once."""
    _reported(model, named_tensors, _place)


def load(model, named_tensors):
    """Copy the file's tensors into the model's parameters, as the model does it."""
    _reported(model, named_tensors, _load)


def take(model, named_tensors):
    """The same by this rank's shares."""
    _reported(model, named_tensors, _take)


def receive(model, named_tensors):
    """The same of tensors of which rank 0 of the group sends this one its shares, end to end."""
    _reported(model, named_tensors, _receive)


def finish(model, named_tensors):
    """What the model makes of its parameters itself, now that all are there."""
    _reported(model, named_tensors, _finish)


def read(model, named_tensors):
    """Write what this rank has of these tensors into a file of its own."""
    _reported(model, named_tensors, _read)


def sums(model, named_tensors):
    """Add up the bits of what this rank has of these tensors."""
    _reported(model, named_tensors, _sums)


def _reported(model, named_tensors, act):
    request = json.loads(named_tensors[0][0])
    report = {"problems": [], "taken": 0, "tensors": [], "dtypes": {}, "otherwise": [], "derives": False}
    try:
        with torch.no_grad():
            report |= act(model, request)
    except Exception as error:
        report["problems"] = [f"{type(error).__name__}: {error}"]
    with open(f"{request['report']}.{_rank()}", "w") as file:
        json.dump(report, file)


def _rank():
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def _load(model, request):
    tensors = _stored(request) if "file" in request else _attached(request)
    model.load_weights(list(tensors.items()))
    return {}


def _take(model, request):
    if "file" in request:
        from safetensors import safe_open

        with safe_open(request["file"], "pt") as file:
            return _copied(model, ((share, file.get_slice(share.tensor)[share.box])
                                   for name in request["names"] for share in model.pbsd_shares.get(name, ())))
    tensors = _attached(request)
    return _copied(model, ((share, tensor[share.box]) for name, tensor in tensors.items()
                           for share in model.pbsd_shares.get(name, ())))


def _receive(model, request):
    from torch.distributed.distributed_c10d import _resolve_process_group

    shares = [(share, getattr(torch, dtype)) for name, dtype, _, _ in request["entries"]
              for share in model.pbsd_shares.get(name, ())]
    flat = torch.empty(sum(share.size * dtype.itemsize for share, dtype in shares), dtype=torch.uint8,
                       device=next(model.parameters()).device)
    if not shares:
        return {}
    try:
        torch.distributed.recv(flat, 0, _resolve_process_group(request["group"]))
    except Exception as error:  # of whatever kind the backend has
        return {"problems": [f"Failed to receive weights: {type(error).__name__}: {error}"]}

    def cut():
        start = 0
        for share, dtype in shares:
            end = start + share.size * dtype.itemsize
            yield share, flat[start:end].view(dtype).view(share.shape)
            start = end

    return _copied(model, cut())


def _copied(model, parts):
    """parts: shares, and what is to be there."""
    parameters, taken = dict(model.named_parameters()), 0
    for share, part in parts:
        parameters[share.parameter].data[share.place].copy_(part)
        taken += part.nbytes
    return {"taken": taken}


def _finish(model, request):
    model.post_load_weights()
    return {}


def _read(model, request):
    from safetensors.torch import save_file

    names = set(request["names"])
    pieces = [piece for piece in model.pbsd_pieces if piece.name in names]
    # Copies: a file has no room for tensors that share memory.
    save_file({str(number): piece.parameter.clone(memory_format=torch.contiguous_format)
               for number, piece in enumerate(pieces)}, f"{request['parts']}.{_rank()}")
    return {"parts": [[piece.name, piece.offset, piece.shape, piece.stride] for piece in pieces]}


def _sums(model, request):
    names, of = set(request["names"]), _checksum().part_sums
    return {"sums": [[piece.name, piece.offset, piece.shape, piece.stride,
                      *of(piece.parameter, model.pbsd_shapes[piece.name], piece.offset, piece.stride)]
                     for piece in model.pbsd_pieces if piece.name in names]}


def _checksum():
    """The project's module, which needs torch alone."""
    path = Path(__file__).parents[4] / "resharding" / "checksum.py"
    spec = importlib.util.spec_from_file_location("pbsd_checksum", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _place(model, request):
    # Storages of their own tell which tensor a part is of. They are never touched, and so take no memory.
    sources = {name: torch.empty(shape, dtype=getattr(torch, dtype)) for name, dtype, shape, _ in request["entries"]}
    copies = Copies(sources)
    problems = []
    try:
        with copies:
            model.load_weights(list(sources.items()))
    except Exception as error:
        problems.append(f"it refuses tensor {copies.last!r} or the one after it: "
                        f"{type(error).__name__}: {error}".rstrip(": "))
    model.pbsd_pieces = copies.pieces
    model.pbsd_shapes = {name: tuple(shape) for name, _, shape, _ in request["entries"]}
    problems += copies.faults
    if not problems:
        # A parameter may be larger than what belongs there: sizes are rounded up for kernels.
        filled = {piece.parameter.untyped_storage().data_ptr() for piece in copies.pieces}
        problems = [f"nothing belongs into its {name!r}" for name, parameter in model.named_parameters()
                    if parameter.untyped_storage().data_ptr() not in filled]
    dtypes = {piece.name: str(piece.parameter.dtype).removeprefix("torch.") for piece in copies.pieces}
    return {"problems": problems, "tensors": list(sources), "dtypes": dtypes,
            "otherwise": _compared(model, request["shares"], sources, copies.pieces),
            "derives": hasattr(model, "post_load_weights")}


def _compared(model, shares, sources, pieces):
    """Keeps this rank's shares; how the copies that they stand for differ from those that the model would make."""
    if not shares:
        return []
    with open(shares[_rank()]) as file:
        planned = [Share(tensor, _box(box), parameter, _box(place))
                   for tensor, box, parameter, place in json.load(file)]
    parameters = dict(model.named_parameters())
    unlike, copies = {}, {}
    for share in planned:
        parameter, source = parameters.get(share.parameter), sources[share.tensor]
        if parameter is None:
            unlike[share.tensor] = f"there is no parameter {share.parameter!r} for {share.tensor!r}"
        elif not (_within(share.box, source) and _within(share.place, parameter)):
            unlike[share.tensor] = (f"{share.parameter!r} has shape {list(parameter.shape)}: {share.tensor!r} "
                                    f"{list(source.shape)} has no part for {_spans(share.place)}")
        else:
            part = source[share.box]
            piece = Piece(parameter.data[share.place].view(part.shape), share.tensor, part.storage_offset(),
                          tuple(part.shape), part.stride())
            copies.setdefault(share.tensor, Counter())[piece.copy] += 1
    made = {}
    for piece in pieces:
        if math.prod(piece.shape):
            made.setdefault(piece.name, Counter())[piece.copy] += 1
    for name in sources:
        if copies.get(name) != made.get(name) and name not in unlike:
            unlike[name] = f"other parts of {name!r} are taken, or put elsewhere"
    model.pbsd_shares = {}
    for share in planned:
        model.pbsd_shares.setdefault(share.tensor, []).append(share)
    return list(unlike.values())


def _box(spans):
    return tuple(slice(start, stop) for start, stop in spans)


def _spans(box):
    return [[part.start, part.stop] for part in box]


def _within(box, tensor):
    return tensor.dim() == len(box) and all(part.stop <= n for part, n in zip(box, tensor.shape))


@dataclass
class Share:
    """parameter[place] = tensor[box]."""

    tensor: str
    box: tuple
    parameter: str
    place: tuple

    @property
    def shape(self):
        return [s.stop - s.start for s in self.box]

    @property
    def size(self):
        return math.prod(self.shape)


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

    @property
    def copy(self):
        """Which element goes where: the same of copies that do the same, in as few dimensions as there can be."""
        dims = []
        for size, *strides in zip(self.shape, self.parameter.stride(), self.stride):
            if size == 1:
                continue
            if dims and all(outer == inner * size for outer, inner in zip(dims[-1][1:], strides)):
                dims[-1] = (dims[-1][0] * size, *strides)
            else:
                dims.append((size, *strides))
        storage = self.parameter.untyped_storage().data_ptr()
        return storage, self.parameter.storage_offset(), self.offset, tuple(dims)


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


def _stored(request):
    from safetensors import safe_open

    with safe_open(request["file"], "pt") as file:
        return {name: file.get_tensor(name) for name in request["names"]}

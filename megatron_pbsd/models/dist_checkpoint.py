"""Where the elements of Hugging Face tensors lie in Megatron-core's distributed checkpoints. Pure data.

Such a checkpoint holds each parameter of the undivided model under one name, whatever the layout that wrote it. The
names are those of a model of Transformer Engine layers, whichever layers it is trained with; a layer's experts share
one tensor with an axis for them. Layers have names of their own ('non_homogeneous_layers'), or share tensors with an
axis for them, which Megatron-core gives up.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from megatron_pbsd.config import ParallelConfig
from megatron_pbsd.models.decoder import Decoder
from megatron_pbsd.models.mapping import pieces
from megatron_pbsd.models.parameters import Index, Piece, coordinates, local_shape, unpaired
from megatron_pbsd.models.transformer_engine import parameter_names

UNDIVIDED = ParallelConfig(world_size=1, tp=1)
LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
EXPERT = re.compile(r"\.experts\.(linear_fc[12]\.weight)(\d+)$")


@dataclass(frozen=True)
class Place:
    """stored[offset : offset + sizes of hf_index] == hf[hf_index], with `stored` the checkpoint's tensor `key`.

    shape:   of the whole stored tensor.
    offset:  one number per dimension of `shape`. Axes for layers or experts come first, with a size of 1.
    step:    of the rows in `stored`; 2 where those of two halves alternate.
    """

    key: str
    shape: tuple[int, ...]
    hf_index: Index
    offset: tuple[int, ...]
    step: int = 1


@dataclass(frozen=True)
class Unit:
    """stored[axes][piece.local_index] == hf[piece.hf_index] for each piece: what one layer or expert has of the
    checkpoint's tensor `key`.

    shape:  of the whole stored tensor. axes: index along each axis for layers or experts, which come first.
    """

    key: str
    shape: tuple[int, ...]
    axes: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def local(self) -> tuple[int, ...]:
        """Shape of this unit."""
        return self.shape[len(self.axes):]


def units(decoder: Decoder, layer_axis: bool = False) -> list[Unit]:
    """All of a checkpoint's weights in the order of the model.

    layer_axis: layers share tensors with an axis for them.
    """
    parameters = pieces(decoder, UNDIVIDED, coordinates(UNDIVIDED, 0), chunk=0)
    names = parameter_names(parameters)
    found = []
    for name, parts in parameters.items():
        key, axes = stored_name(names[name], decoder, layer_axis)
        shape = (*(size for _, size in axes), *local_shape(parts))
        found.append(Unit(key, shape, tuple(number for number, _ in axes), tuple(parts)))
    return found


def places(decoder: Decoder, layer_axis: bool = False, as_in_layouts: bool = False) -> dict[str, list[Place]]:
    """Hugging Face name → where its parts are stored; over all names every stored element once.

    layer_axis:     layers share tensors with an axis for them.
    as_in_layouts:  rows of Hugging Face tensors have the order that all layouts have (`parameters.unpaired`).
    """
    found: dict[str, list[Place]] = {}
    for unit in units(decoder, layer_axis):
        for part in unpaired(unit.pieces) if as_in_layouts else unit.pieces:
            offset = (*unit.axes, *(s.start for s in part.local_index))
            found.setdefault(part.hf_name, []).append(
                Place(unit.key, unit.shape, part.hf_index, offset, part.local_index[0].step or 1))
    return found


def has_layer_axis(keys: Collection[str]) -> bool:
    """Whether in a checkpoint with these keys layers share tensors."""
    return any(key.startswith("decoder.layers.") for key in keys) and not any(LAYER.match(key) for key in keys)


def extra_states(decoder: Decoder) -> list[str]:
    """Keys of objects that models expect beside their weights: what fp8 keeps of each module, empty without fp8.

    Those of Transformer Engine's layers and of Megatron-core's own together; neither minds the other's.
    """
    modules: dict[str, list[int]] = {}
    for unit in units(decoder):
        module, _, parameter = unit.key.rpartition(".")
        if parameter == "weight" and unit.key.startswith("decoder.") and not module.endswith("router"):
            modules.setdefault(module, []).extend(unit.axes)
    attention = [f"decoder.layers.{i}.self_attention.core_attention" for i in range(decoder.num_hidden_layers)]
    return [f"{module}._extra_state/shard_{i}_{max(len(experts), 1)}"
            for module, experts in (modules | {key: [] for key in attention}).items() for i in experts or [0]]


def rank_boxes(
    decoder: Decoder, parallel: ParallelConfig, rank: int, layer_axis: bool = False
) -> Iterator[tuple[str, Index]]:
    """Key and box of each part of a checkpoint's weights that this rank speaks for at this layout; over all ranks every
    element once."""
    stored = places(decoder, layer_axis, as_in_layouts=True)
    for chunk in range(parallel.vpp):
        for parts in pieces(decoder, parallel, coordinates(parallel, rank), chunk).values():
            boxes: list[tuple[str, Index]] = []
            for piece in unpaired(parts):
                if piece.primary:
                    boxes += [(place.key, box) for place in stored[piece.hf_name]
                              if (box := _stored_box(place, piece.hf_index))]
            yield from _joined(boxes)


def _stored_box(place: Place, index: Index) -> Index | None:
    """Where the elements hf[index] lie, as far as they are at this place."""
    axes = len(place.offset) - len(index)
    box = [slice(o, o + 1) for o in place.offset[:axes]]
    for wanted, held, offset in zip(index, place.hf_index, place.offset[axes:], strict=True):
        start, stop = max(wanted.start, held.start), min(wanted.stop, held.stop)
        if start >= stop:
            return None
        box.append(slice(offset + start - held.start, offset + stop - held.start))
    return tuple(box)


def _joined(boxes: list[tuple[str, Index]]) -> Iterator[tuple[str, Index]]:
    """The same elements in fewer boxes, where one follows another along the first dimension that is not an axis."""
    held: tuple[str, Index] | None = None
    for key, box in boxes:
        if held is not None and key == held[0]:
            differing = [d for d, (a, b) in enumerate(zip(held[1], box, strict=True)) if a != b]
            if len(differing) == 1 and held[1][d := differing[0]].stop == box[d].start:
                held = key, (*box[:d], slice(held[1][d].start, box[d].stop), *box[d + 1:])
                continue
        if held is not None:
            yield held
        held = key, box
    if held is not None:
        yield held


def stored_name(name: str, decoder: Decoder, layer_axis: bool = False) -> tuple[str, list[tuple[int, int]]]:
    """Key of the parameter `name` of the undivided Transformer Engine model, and (index, size) for each axis that it
    shares the tensor along."""
    axes = []
    if layer_axis and (layer := LAYER.match(name)):
        axes.append((int(layer[1]), decoder.num_hidden_layers))
        name = LAYER.sub("decoder.layers.", name)
    if decoder.experts is not None and (expert := EXPERT.search(name)):
        axes.append((int(expert[2]), decoder.experts.num_experts))
        name = EXPERT.sub(r".experts.experts.\1", name)
    return name, axes

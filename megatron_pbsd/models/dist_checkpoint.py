"""Where the elements of Hugging Face tensors lie in Megatron-core's distributed checkpoints. Pure data.

Such a checkpoint holds each parameter of the undivided model under one name, whatever the layout that wrote it. The
names are those of a model of Transformer Engine layers, whichever layers it is trained with; a layer's experts share
one tensor with an axis for them. Layers have names of their own ('non_homogeneous_layers'), or share tensors with an
axis for them, which Megatron-core gives up.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from megatron_pbsd.config import ParallelConfig
from megatron_pbsd.models.decoder import Decoder
from megatron_pbsd.models.mapping import pieces
from megatron_pbsd.models.parameters import Index, coordinates, local_shape, unpaired
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


def places(decoder: Decoder, layer_axis: bool = False, as_in_layouts: bool = False) -> dict[str, list[Place]]:
    """Hugging Face name → where its parts are stored; over all names every stored element once.

    layer_axis:     layers share tensors with an axis for them.
    as_in_layouts:  rows of Hugging Face tensors have the order that all layouts have (`parameters.unpaired`).
    """
    parameters = pieces(decoder, UNDIVIDED, coordinates(UNDIVIDED, 0), chunk=0)
    names = parameter_names(parameters)
    found: dict[str, list[Place]] = {}
    for name, parts in parameters.items():
        key, axes = stored_name(names[name], decoder, layer_axis)
        shape = (*(size for _, size in axes), *local_shape(parts))
        for part in unpaired(parts) if as_in_layouts else parts:
            offset = (*(number for number, _ in axes), *(s.start for s in part.local_index))
            found.setdefault(part.hf_name, []).append(
                Place(key, shape, part.hf_index, offset, part.local_index[0].step or 1))
    return found


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

"""Which rank of a learner, or of engines, holds which part of a model's tensors: both in the same words.

Layers of one kind are divided alike, and so are the experts of a layer. A layout is therefore read off the parameter
map of a sample, which has one layer of each kind, and one expert on each rank; which layers and experts a rank has is
told by numbers. A trillion parameters take no longer than a billion.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_pbsd.boxes import Box
from megatron_pbsd.config import ParallelConfig
from megatron_pbsd.models import mapping, sglang
from megatron_pbsd.models.decoder import Decoder, hf_tensors
from megatron_pbsd.models.errors import ModelError
from megatron_pbsd.models.layout import layout_problems
from megatron_pbsd.models.parameters import (
    ParameterMap,
    Piece,
    RankCoordinates,
    coordinates,
    local_experts,
    stage_layers,
)
from megatron_pbsd.models.sglang import ServerParallel

LAYER, EXPERT = re.compile(r"\blayers\.(\d+)\."), re.compile(r"experts\.(\d+)\.")
Numbers = np.ndarray
"""int64."""


@dataclass(frozen=True)
class Kind:
    """Tensors that are alike: one of the model, one of each of `layers`, or of each of the `experts` of these.

    name:    in checkpoints, with {layer} and {expert}. shape: of each tensor.
    layers:  None for a tensor of the model.
    experts: how many each layer has; None for a tensor of the layer itself.
    """

    name: str
    shape: tuple[int, ...]
    layers: tuple[int, ...] | None
    experts: int | None

    @property
    def count(self) -> int:
        """Tensors of this kind."""
        return (1 if self.layers is None else len(self.layers)) * (self.experts or 1)


@dataclass(frozen=True)
class Slot:
    """parameter[local] == tensor[box], for each tensor of a kind that a rank with this share has.

    parameter:  its name, with {layer} and {expert}. An axis for experts comes first where `local` has one more slice
                than `box`; it begins at the rank's first expert.
    share:      of the ranks that divide the tensor, which one: of `dense_share`, or of `expert_share` for experts.
    stage:      pipeline rank that has it; None: the layer's.
    chunk:      of that rank's model chunks; None: the layer's.
    """

    kind: Kind
    parameter: str
    box: Box
    local: Box
    share: int
    stage: int | None = None
    chunk: int | None = None


@dataclass(frozen=True)
class Place:
    """Part of a parameter of a rank: `box` of the parameter `name` of model chunk `chunk`."""

    name: str
    box: Box
    chunk: int = 0


@dataclass(frozen=True)
class Layout:
    """Arrays with one number for each rank (dense_share, expert_share, stage, part, device), for each layer
    (layer_stage, layer_chunk, layer_number) or for each expert (expert_part, expert_number).

    stage, layer_stage:         a rank has the layers of its stage.
    part, expert_part:          and in these the experts of its part.
    layer_number, expert_number: what the names of parameters call them.
    device:                     the GPU, counted through the cluster.
    """

    slots: tuple[Slot, ...]
    dense_share: Numbers
    expert_share: Numbers
    stage: Numbers
    part: Numbers
    device: Numbers
    layer_stage: Numbers
    layer_chunk: Numbers
    layer_number: Numbers
    expert_part: Numbers
    expert_number: Numbers

    @property
    def ranks(self) -> int:
        return len(self.stage)

    def holders(self, slot: Slot, layer: int, expert: int) -> Numbers:
        """Ranks, ascending, that have this slot of the tensor of `layer` and `expert` (any, where it has none)."""
        share = self.dense_share if slot.kind.experts is None else self.expert_share
        held = share == slot.share
        if slot.stage is not None or slot.kind.layers is not None:
            held &= self.stage == (self.layer_stage[layer] if slot.stage is None else slot.stage)
        if slot.kind.experts is not None:
            held &= self.part == self.expert_part[expert]
        return np.flatnonzero(held)

    def has(self, rank: int, slot: Slot) -> bool:
        """Whether this rank, which has the layer and the expert that are meant, if any, has this slot of it."""
        share = self.dense_share if slot.kind.experts is None else self.expert_share
        return bool(share[rank] == slot.share and slot.stage in (None, self.stage[rank]))

    def place(self, slot: Slot, box: Box, layer: int, expert: int) -> Place:
        """Where the elements tensor[box], a part of the slot's, lie."""
        extra = len(slot.local) - len(slot.box)
        name = slot.parameter.format(layer=self.layer_number[layer], expert=self.expert_number[expert])
        number = int(self.expert_number[expert])
        index = [slice(number, number + 1)] * extra
        for part, whole, local in zip(box, slot.box, slot.local[extra:], strict=True):
            step = local.step or 1
            start = local.start + (part.start - whole.start) * step
            last = local.start + (part.stop - 1 - whole.start) * step
            index.append(slice(start, last + 1, *([step] if step > 1 else [])))
        chunk = self.layer_chunk[layer] if slot.chunk is None else slot.chunk
        return Place(name, tuple(index), int(chunk))


def kinds(decoder: Decoder) -> dict[str, Kind]:
    """By the name of a tensor of the `sample` of one stage."""
    chosen = sample(decoder, 1)
    variants = _variants(decoder)
    layers = [tuple(i for i in range(decoder.num_hidden_layers) if decoder.has_experts(i) == v) for v in variants]
    found = {}
    for name, shape in hf_tensors(chosen).items():
        layer, expert = LAYER.search(name), EXPERT.search(name)
        if expert and expert[1] != "0":
            continue
        found[name] = Kind(_template(name), shape, layers[int(layer[1])] if layer else None,
                           _experts(decoder) if expert else None)
    return found


def sample(decoder: Decoder, stages: int) -> Decoder:
    """With one layer of each kind for each of `stages` equal pipeline stages."""
    variants = _variants(decoder) * stages
    experts = decoder.experts and replace(decoder.experts, layers=tuple(variants))
    return replace(decoder, num_hidden_layers=len(variants), experts=experts)


def learner_layout(decoder: Decoder, parallel: ParallelConfig, device: int = 0) -> Layout:
    """Of Megatron's ranks, which have GPUs from `device` on, one each. ModelError when the model cannot be divided."""
    if found := layout_problems(decoder, parallel):
        raise ModelError("; ".join(found))
    stages = min(parallel.pp, 2)
    chosen = sample(decoder, stages)
    alike = parallel.model_copy(update={
        "world_size": parallel.world_size // parallel.pp * stages, "pp": stages, "vpp": 1})

    def pieces(dense: int, expert: int, stage: int) -> ParameterMap:
        at = RankCoordinates(tp=dense, cp=0, dp=0, pp=stage, etp=expert, ep=0, expert_dp=0)
        return mapping.pieces(chosen, alike, at, 0)

    at = [coordinates(parallel, rank) for rank in range(parallel.world_size)]
    layers = np.zeros((3, decoder.num_hidden_layers), np.int64)
    for pp in range(parallel.pp):
        for chunk in range(parallel.vpp):
            held = stage_layers(decoder.num_hidden_layers, parallel, pp, chunk)
            layers[:, held.start : held.stop] = np.stack(np.broadcast_arrays(pp, chunk, np.arange(len(held))))
    part, number = _dealt([local_experts(_experts(decoder), parallel, ep) for ep in range(parallel.ep)])
    return Layout(
        tuple(_slots(decoder, pieces, parallel.tp, parallel.etp, parallel.pp, parallel.vpp)),
        dense_share=_array(c.tp for c in at), expert_share=_array(c.etp for c in at),
        stage=_array(c.pp for c in at), part=_array(c.ep for c in at),
        device=device + np.arange(parallel.world_size),
        layer_stage=layers[0], layer_chunk=layers[1], layer_number=layers[2],
        expert_part=part, expert_number=number)


def server_layout(decoder: Decoder, server: ServerParallel, servers: int, device: int = 0) -> Layout:
    """Of all ranks of equal SGLang servers, one server after the other, which have GPUs from `device` on. ModelError
    when the model cannot be divided."""
    if found := sglang.problems(decoder, server):
        raise ModelError("; ".join(found))
    alike = replace(server, pp=min(server.pp, 2))
    chosen = sample(decoder, alike.pp)

    def pieces(dense: int, expert: int, stage: int) -> ParameterMap:
        return sglang.pieces(chosen, alike, max(dense, expert), stage)  # one of them is 0

    each = _experts(decoder) // server.ep
    rank = np.arange(servers * server.size)
    tp = rank % server.tp
    part, number = _dealt([range(i * each, (i + 1) * each) for i in range(server.ep)])
    stage, _ = _dealt([sglang.stage_layers(decoder.num_hidden_layers, server.pp, pp) for pp in range(server.pp)])
    return Layout(
        tuple(_slots(decoder, pieces, server.tp, server.expert_tp, server.pp, 1)),
        dense_share=tp, expert_share=tp % server.expert_tp,
        stage=rank // server.tp % server.pp, part=tp // server.expert_tp, device=device + rank,
        layer_stage=stage, layer_chunk=np.zeros_like(stage), layer_number=np.arange(len(stage)),
        expert_part=part, expert_number=number)


def embedded_layout(decoder: Decoder, engines: int, device: int = 0) -> Layout:
    """Of embedded engines, each of which has every tensor whole, by its name in checkpoints."""
    every = tuple(
        Slot(kind, kind.name, box := tuple(slice(0, n) for n in kind.shape), box, 0)
        for kind in kinds(decoder).values())
    layers, none = np.arange(decoder.num_hidden_layers), np.zeros(engines, np.int64)
    experts = np.arange(_experts(decoder))
    return Layout(
        every, dense_share=none, expert_share=none, stage=none, part=none, device=device + np.arange(engines),
        layer_stage=np.zeros_like(layers), layer_chunk=np.zeros_like(layers), layer_number=layers,
        expert_part=np.zeros_like(experts), expert_number=experts)


def _slots(
    decoder: Decoder, pieces: Callable[[int, int, int], ParameterMap], dense: int, expert: int, pp: int, vpp: int
) -> Iterator[Slot]:
    """pieces: (dense share, expert share, stage of the sample) → the sample's parameters on the first of such ranks.
    dense, expert: how many shares there are of each."""
    known, variants = kinds(decoder), len(_variants(decoder))

    def found(parameters: ParameterMap) -> Iterator[tuple[Kind, str, Piece]]:
        for parameter, parts in parameters.items():
            for piece in parts:
                name = LAYER.sub(lambda layer: f"layers.{int(layer[1]) % variants}.", piece.hf_name)
                if name in known:  # of experts only the first
                    yield known[name], _template(parameter), piece

    for share in range(dense):
        for stage in range(min(pp, 2)):
            end = (0, pp - 1)[stage], (0, vpp - 1)[stage]
            for kind, parameter, piece in found(pieces(share, 0, stage)):
                if kind.layers is None:
                    yield Slot(kind, parameter, piece.hf_index, piece.local_index, share, *end)
                elif kind.experts is None and stage == 0:
                    yield Slot(kind, parameter, piece.hf_index, piece.local_index, share)
    for share in range(expert):
        for kind, parameter, piece in found(pieces(0, share, 0)):
            if kind.experts is not None:
                yield Slot(kind, parameter, piece.hf_index, piece.local_index, share)


def _template(name: str) -> str:
    return EXPERT.sub("experts.{expert}.", LAYER.sub("layers.{layer}.", name))


def _experts(decoder: Decoder) -> int:
    return decoder.experts.num_experts if decoder.experts else 1


def _variants(decoder: Decoder) -> list[bool]:
    """Whether layers have experts: both answers, if both occur."""
    return sorted({decoder.has_experts(layer) for layer in range(decoder.num_hidden_layers)})


def _dealt(held: Sequence[range]) -> tuple[Numbers, Numbers]:
    """Of each number that these ranges have, in which one it is, and at which place of it."""
    return (np.concatenate([np.full(len(numbers), i) for i, numbers in enumerate(held)]),
            np.concatenate([np.arange(len(numbers)) for numbers in held]))


def _array(numbers: Iterator[int]) -> Numbers:
    return np.fromiter(numbers, np.int64)

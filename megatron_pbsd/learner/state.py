"""What a checkpoint keeps of the learner: model, optimizer, schedule, random numbers. Readable at any layout.

    <key>                          a parameter or stored buffer of the undivided model, by its name in
                                   `models/dist_checkpoint.py`; a value head's are value_head.weight and value_head.bias
    optimizer.state.exp_avg.<key>  float32, Adam's moments; also exp_avg_sq
    optimizer.state.param.<key>    float32, what a bfloat16 parameter is rounded from
    rng/<rank>                     random-number generators, of use to the same layout
    common.pt                      Adam's settings and steps, schedule, layout, dtype, config.json

Each element is written by one rank: those that have the same ones divide them evenly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_pbsd.checkpointing.errors import CheckpointError
from megatron_pbsd.checkpointing.torch_dist import Reader
from megatron_pbsd.config import ParallelConfig
from megatron_pbsd.learner import optimizer_state
from megatron_pbsd.learner.errors import LearnerError
from megatron_pbsd.learner.optimizer_state import MASTER
from megatron_pbsd.learner.saving import Content, Part
from megatron_pbsd.learner.shards import Shard, shards, share, view
from megatron_pbsd.learner.weights import VALUE_HEAD, held_tensors
from megatron_pbsd.models.dist_checkpoint import Place, has_layer_axis, places
from megatron_pbsd.models.family import Family
from megatron_pbsd.models.parameters import ParameterMap, Piece, RankCoordinates, unpaired
from megatron_pbsd.platform import Platform

OPTIMIZER = "optimizer."
NAMED_PROBLEMS = 20


@dataclass(frozen=True)
class Local:
    """A parameter or stored buffer of this rank.

    written:  of its pieces those that this rank writes, together with the ranks that differ from it in their data only.
    """

    tensor: torch.Tensor
    pieces: Sequence[Piece]
    written: Sequence[Piece]

    @property
    def flat(self) -> torch.Tensor:
        return self.tensor.detach().view(-1)

    @property
    def is_expert(self) -> bool:
        return not getattr(self.tensor, "allreduce", True)


@dataclass(frozen=True)
class Wanted:
    """The elements of `shard` belong into `target`. keys: where they may be found, the best first."""

    shard: Shard
    keys: tuple[str, ...]
    target: torch.Tensor


class LearnerState:
    """State of the rank at `at`, global rank `rank`.

    chunks:  its model chunks. maps: for each of them what lies where, by name in the chunk; `first` is the same for the
             first of the ranks that differ from this one in their data only.
    """

    def __init__(
        self, chunks: Sequence[torch.nn.Module], maps: Sequence[ParameterMap], first: Sequence[ParameterMap],
        optimizer: MegatronOptimizer, scheduler: OptimizerParamScheduler, platform: Platform, family: Family,
        hf: Mapping[str, Any], parallel: ParallelConfig, at: RankCoordinates, rank: int, value_head: bool,
    ):
        self._optimizer, self._scheduler, self._platform = optimizer, scheduler, platform
        self._hf, self._decoder, self._value_head = dict(hf), family.decoder(hf), value_head
        self._parallel, self._at, self._rank = parallel, at, rank
        self._dtype = str(chunks[0].config.params_dtype).removeprefix("torch.")
        self._locals = [
            _local(name, tensor, mine, theirs, at)
            for chunk, mine, theirs in zip(chunks, maps, first, strict=True) for name, tensor in held_tensors(chunk)]
        self._plan: tuple[list[Part], list[Part]] | None = None

    def content(self) -> Content:
        """What this rank writes now: parameters and optimizer state themselves, which only an optimizer step changes,
        and copies of the rest."""
        if self._plan is None:
            self._plan = self._parts()
        # Routers change theirs at the end of a backward pass.
        buffers = [replace(part, values=part.values.clone()) for part in self._plan[1]]
        return Content([*self._plan[0], *buffers], {_rng_key(self._rank): self._platform.rng_state()},
                       self._common() if self._rank == 0 else None)

    def load(self, folder: Path, weights_only: bool) -> None:
        """Read what this rank needs, whatever the layout that wrote it. Random-number states belong to a layout: at
        another one they stay as they are.

        weights_only:  leave moments, steps and schedule as they are, as for a converted checkpoint, which has none.
        LearnerError naming all tensors that are missing, unexpected or of another shape.
        """
        reader = Reader(folder)
        common = reader.common()
        if not weights_only and "adam" not in common:
            raise LearnerError(f"{folder} holds weights without the state of an optimizer, and no run to continue; "
                               "load its weights only")
        stored = self._places(has_layer_axis(reader.tensors))
        wanted = self._wanted(stored, reader, weights_only)
        problems = self._problems(stored, wanted, reader, weights_only)
        if not problems:
            problems = _fill(wanted, reader)
        if problems:
            more = f"; and {len(problems) - NAMED_PROBLEMS} more" if len(problems) > NAMED_PROBLEMS else ""
            raise LearnerError(
                f"{folder} does not hold what this model needs: " + "; ".join(problems[:NAMED_PROBLEMS]) + more)
        if weights_only:
            return
        optimizer_state.set_settings(self._optimizer, common["adam"])
        # Megatron-core adds the number of steps to those it has counted.
        self._scheduler.num_steps = 0
        self._scheduler.load_state_dict(common["scheduler"])
        if common["layout"] == _layout(self._parallel):
            self._platform.set_rng_state(reader.object(_rng_key(self._rank)))

    def _parts(self) -> tuple[list[Part], list[Part]]:
        """What this rank writes of parameters and optimizer, and of buffers."""
        stored, ranges = self._places(), self._shares()
        parameters, buffers = [], []
        for local in self._locals:
            kind = parameters if isinstance(local.tensor, torch.nn.Parameter) else buffers
            kind += _parts_of(local, local.flat, 0, ranges[id(local.tensor)], stored, "")
        by_parameter = {id(local.tensor): local for local in self._locals}
        for held in optimizer_state.held(self._optimizer):
            local = by_parameter[id(held.parameter)]
            mine = (held.start, held.start + len(held.flat)) if held.divided else ranges[id(held.parameter)]
            parameters += _parts_of(local, held.flat, held.start, mine, stored, _prefix(held.kind))
        return parameters, buffers

    def _shares(self) -> dict[int, tuple[int, int]]:
        """id of a tensor → which of its flattened elements this rank writes, if none other has state for them."""
        at, parallel = self._at, self._parallel
        found = {}
        for is_expert, number, ranks in ((False, at.dp * parallel.cp + at.cp, parallel.dp * parallel.cp),
                                         (True, at.expert_dp, parallel.expert_dp)):
            group = [local for local in self._locals if local.is_expert == is_expert and local.written]
            ranges = share([local.tensor.shape for local in group], ranks, number)
            found |= {id(local.tensor): mine for local, mine in zip(group, ranges, strict=True)}
        return {id(local.tensor): (0, 0) for local in self._locals} | found

    def _places(self, layer_axis: bool = False) -> dict[str, list[Place]]:
        stored = places(self._decoder, layer_axis, as_in_layouts=True)
        if self._value_head:
            for name, shape in (("weight", (1, self._decoder.hidden_size)), ("bias", (1,))):
                key = f"{VALUE_HEAD}{name}"
                stored[key] = [Place(key, shape, _whole(shape), (0,) * len(shape))]
        return stored

    def _wanted(self, stored: Mapping[str, list[Place]], reader: Reader, weights_only: bool) -> list[Wanted]:
        wanted = []
        for local in self._locals:
            names = ("",) if local.tensor.dtype != torch.float32 else (_prefix(MASTER), "")
            wanted += _wants(local, local.flat, 0, stored, names)
        by_parameter = {id(local.tensor): local for local in self._locals}
        for held in optimizer_state.held(self._optimizer):
            if held.kind == MASTER or not weights_only:
                names = (_prefix(MASTER), "") if held.kind == MASTER else (_prefix(held.kind),)
                wanted += _wants(by_parameter[id(held.parameter)], held.flat, held.start, stored, names)
        # A value head begins with zeros, as with weights in Hugging Face format.
        return [one for one in wanted if not (
            weights_only and one.shard.key.startswith(VALUE_HEAD) and one.shard.key not in reader.tensors)]

    def _problems(
        self, stored: Mapping[str, list[Place]], wanted: Sequence[Wanted], reader: Reader, weights_only: bool
    ) -> list[str]:
        problems = []
        for one in wanted:
            key = next((key for key in one.keys if key in reader.tensors), None)
            if key is None:
                # Where there are no weights, moments need not be named too.
                if one.keys[-1] == one.shard.key or one.shard.key in reader.tensors:
                    problems.append(f"{one.keys[-1]} is missing")
            elif reader.tensors[key].shape != one.shard.shape:
                problems.append(f"{key} has shape {reader.tensors[key].shape}, this model's is {one.shard.shape}")
        if not weights_only:
            known = {place.key for parts in stored.values() for place in parts}
            problems += [f"{key} is unexpected" for key in reader.tensors
                         if key not in known and not key.startswith(OPTIMIZER)]
        return list(dict.fromkeys(problems))

    def _common(self) -> dict[str, Any]:
        return {
            "model": self._hf, "dtype": self._dtype, "layout": _layout(self._parallel),
            "adam": optimizer_state.settings(self._optimizer), "scheduler": self._scheduler.state_dict()}


def _local(
    name: str, tensor: torch.Tensor, mine: ParameterMap, first: ParameterMap, at: RankCoordinates
) -> Local:
    if name.startswith(VALUE_HEAD):
        pieces = [Piece(name, _whole(tensor.shape), _whole(tensor.shape), primary=at.tp == 0)]
        return Local(tensor, pieces, pieces if at.tp == 0 else [])
    written = [piece for piece, spoken in zip(mine[name], first[name], strict=True) if spoken.primary]
    return Local(tensor, unpaired(mine[name]), unpaired(written))


def _parts_of(
    local: Local, flat: torch.Tensor, start: int, elements: tuple[int, int], stored: Mapping[str, list[Place]],
    prefix: str,
) -> Iterator[Part]:
    """The `elements` [start, stop) of a parameter, of which `flat` has those from `start` on."""
    for shard in shards(local.written, stored, local.tensor.shape, *elements):
        yield Part(prefix + shard.key, shard.shape, shard.offset, view(flat, start, local.tensor.shape, shard.box))


def _wants(
    local: Local, flat: torch.Tensor, start: int, stored: Mapping[str, list[Place]], prefixes: Sequence[str]
) -> Iterator[Wanted]:
    for shard in shards(local.pieces, stored, local.tensor.shape, start, start + len(flat)):
        yield Wanted(shard, tuple(prefix + shard.key for prefix in prefixes),
                     view(flat, start, local.tensor.shape, shard.box))


def _fill(wanted: Sequence[Wanted], reader: Reader) -> list[str]:
    """What could not be read."""
    problems = []
    for one in wanted:
        key = next(key for key in one.keys if key in reader.tensors)
        try:
            values = reader.read(key, one.shard.stored_box)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        one.target.copy_(values.view(one.shard.size))
    return problems


def _prefix(kind: str) -> str:
    """Of the keys of optimizer state."""
    return f"{OPTIMIZER}state.{kind}."


def _rng_key(rank: int) -> str:
    return f"rng/{rank}"


def _layout(parallel: ParallelConfig) -> dict[str, int]:
    return {name: getattr(parallel, name) for name in ("tp", "pp", "vpp", "cp", "dp", "ep", "etp")}


def _whole(shape: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(0, n) for n in shape)

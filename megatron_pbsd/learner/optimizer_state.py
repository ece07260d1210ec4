"""What Megatron-core's optimizers keep for each parameter, whichever of them it is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params

MASTER = "param"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Held:
    """State for elements [start, start + len(flat)) of the flattened `parameter`.

    kind:     one of `MOMENTS`, or `MASTER`: the float32 copy of a bfloat16 parameter.
    flat:     float32 [elements], a view.
    divided:  no other data-parallel rank has it.
    """

    parameter: torch.nn.Parameter
    kind: str
    flat: torch.Tensor
    start: int
    divided: bool


def held(optimizer: MegatronOptimizer) -> Iterator[Held]:
    """All of this rank's state; what Adam would make at its first step is made now."""
    for part in parts(optimizer):
        divided = isinstance(part, DistributedOptimizer)
        for parameter, main, start in _optimized(part):
            if parameter.dtype != main.dtype:
                yield Held(parameter, MASTER, main.detach().view(-1), start, divided)
            state = _state(part.optimizer, main)
            for kind in MOMENTS:
                yield Held(parameter, kind, state[kind].view(-1), start, divided)


def parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """Megatron makes one for dense and one for expert parameters; a rank without parameters has none."""
    chained = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    return [part for part in chained if part.optimizer is not None]


def settings(optimizer: MegatronOptimizer) -> dict[str, Any]:
    """Adam's own numbers, the same for all parameters. Learning rate and weight decay are the scheduler's."""
    part = parts(optimizer)[0].optimizer
    group = next(group for group in part.param_groups if group["params"])
    step = part.state[group["params"][0]].get("step", 0) if _counts_per_parameter(part) else group.get("step", 0)
    return {"step": int(step), "betas": list(group["betas"]), "eps": group["eps"]}


def set_settings(optimizer: MegatronOptimizer, values: dict[str, Any]) -> None:
    """Inverse of `settings`, once `held` has been asked for."""
    for part in (part.optimizer for part in parts(optimizer)):
        for group in part.param_groups:
            group["betas"], group["eps"] = tuple(values["betas"]), values["eps"]
            if not _counts_per_parameter(part):
                group["step"] = values["step"]
                continue
            for parameter in group["params"]:
                part.state[parameter]["step"].fill_(values["step"])


def renew_masters(optimizer: MegatronOptimizer) -> None:
    """Make bfloat16 parameters, whose values have been set, what they are rounded from."""
    for state in held(optimizer):
        if state.kind == MASTER:
            state.flat.copy_(state.parameter.detach().view(-1)[state.start : state.start + len(state.flat)])


def _optimized(part: MegatronOptimizer) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor, int]]:
    """Each model parameter, the float32 tensor that Adam updates for it, and where in it that begins."""
    if isinstance(part, DistributedOptimizer):
        for models, mains in ((part.model_float16_groups, part.shard_fp32_from_float16_groups),
                              (part.model_fp32_groups, part.shard_fp32_groups)):
            for parameter, main in _pairs(models, mains):
                yield parameter, main, part._get_model_param_range_map(parameter)["param"].start
    elif isinstance(part, Float16OptimizerWithFloat16Params):
        for models, mains in ((part.float16_groups, part.fp32_from_float16_groups),
                              (part.fp32_from_fp32_groups, part.fp32_from_fp32_groups)):
            for parameter, main in _pairs(models, mains):
                yield parameter, main, 0
    else:
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                yield parameter, parameter, 0


def _pairs(
    models: list[list[torch.nn.Parameter]], mains: list[list[torch.Tensor]]
) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
    for model_group, main_group in zip(models, mains, strict=True):
        yield from zip(model_group, main_group, strict=True)


def _state(adam: torch.optim.Optimizer, main: torch.Tensor) -> dict[str, torch.Tensor]:
    state = adam.state[main]
    if not state:
        state |= {kind: torch.zeros_like(main.data) for kind in MOMENTS}
        if _counts_per_parameter(adam):
            state["step"] = torch.tensor(0.0)
    return state


def _counts_per_parameter(adam: torch.optim.Optimizer) -> bool:
    """torch's Adam counts steps for each parameter, Transformer Engine's and Apex's for a group."""
    return isinstance(adam, torch.optim.Adam | torch.optim.AdamW)

"""Which experts a mixture-of-experts model of transformers chooses as it runs."""

from __future__ import annotations

import inspect
from functools import partial

import torch
from torch import nn


class ExpertChoices:
    """Listens from now on to every MoE layer of `model`; ValueError for a family whose choices cannot be heard.

    It hears them where a layer hands its tokens to the expert weights, `experts(hidden_states, top_k_index, …)`: what
    transformers' families have in common whatever their router, and what is computed with. Dense layers have none.
    """

    def __init__(self, model: nn.Module) -> None:
        layers = {name: module for name, module in model.named_modules() if name.endswith(".experts")}
        for name, module in layers.items():
            if list(inspect.signature(module.forward).parameters)[1:2] != ["top_k_index"]:
                raise ValueError(f"{name} ({type(module).__name__}) is not given its choice of experts as top_k_index")
        self._latest: list[torch.Tensor | None] = [None] * len(layers)
        for index, module in enumerate(layers.values()):
            module.register_forward_pre_hook(partial(self._hear, index))

    def __len__(self) -> int:
        """Number of MoE layers."""
        return len(self._latest)

    def _hear(self, index: int, module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        self._latest[index] = arguments[1]

    def latest(self) -> torch.Tensor:
        """int16 [T, MoE layers, top-k]: of the latest forward pass, each token's experts in the order of choice."""
        return torch.stack(self._latest, dim=1).to(torch.int16)

"""Routers of mixture-of-experts layers: replay of prescribed experts, balancing, and what routing looked like.

Megatron-core's own replay keeps one global list of routers and one target for all of them; here a router reads what
the micro-batch in hand prescribes for its layer (R3, arXiv 2510.11370), and routes the other positions by itself.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig


@dataclass(frozen=True)
class Positions:
    """What routers must know of a micro-batch; S and B are this rank's, after sequence parallelism.

    padding:  bool [S * B], positions that hold no token.
    experts:  int64 [S * B, MoE layers of the model, top-k] prescribed experts, -1 where none are, or None.
    trained:  tokens trained on in the micro-batch, over the ranks that share it, divided by their number.
    """

    padding: torch.Tensor
    experts: torch.Tensor | None
    trained: float


class RoutingContext:
    """Shared by the routers of a model chunk; the chunk sets `positions` before each forward pass."""

    positions: Positions | None = None


class Replay:
    """In place of the top-k choice of `topk_routing_with_score_function`: the prescribed experts [N, top-k]."""

    def __init__(self, experts: torch.Tensor):
        self.experts = experts

    def get_replay_topk(
        self, scores: torch.Tensor, topk: int, num_groups: int | None, group_topk: int | None,
        default_compute_topk: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores and indices [N, top-k]. The name and the arguments are Megatron-core's."""
        chosen = default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)[1]
        experts = torch.where(self.experts >= 0, self.experts, chosen)
        return scores.gather(1, experts), experts


@dataclass
class RouterStatistics:
    """Sums over the positions of an optimizer step that hold a token. load: float64 [experts], positions per expert."""

    load: np.ndarray
    entropy: float = 0.0
    positions: float = 0.0
    dropped: float = 0.0
    aux_loss: float = 0.0

    def add(self, other: RouterStatistics) -> None:
        self.load = self.load + other.load
        self.entropy += other.entropy
        self.positions += other.positions
        self.dropped += other.dropped
        self.aux_loss += other.aux_loss

    def metrics(self, layer: int) -> dict[str, float]:
        """load_max: share of the busiest expert over the even share. entropy: of the router's distribution (nats).
        dropped: share of the top-k choices that no expert computed."""
        share = self.load / max(self.load.sum(), 1.0)
        count = max(self.positions, 1.0)
        found = {"load_max": share.max() * len(share), "load_min": share.min() * len(share),
                 "entropy": self.entropy / count, "dropped": self.dropped / count}
        if self.aux_loss:
            found["aux_loss"] = self.aux_loss / count
        return {f"router/layer_{layer:02d}/{name}": float(value) for name, value in found.items()}


class Router(TopKRouter):
    """TopKRouter that reads the chunk's `RoutingContext`."""

    def __init__(self, config: TransformerConfig, pg_collection: Any = None):
        super().__init__(config=config, pg_collection=pg_collection)
        self.context = RoutingContext()
        self._now: Positions | None = None
        self._again: deque[Positions] = deque()
        self.reset_statistics()

    def set_layer_number(self, layer_number: int) -> None:
        """`layer_number` counts all layers of the model from 1."""
        super().set_layer_number(layer_number)
        self.moe_layer = moe_layers(self.config).index(layer_number - 1)

    def reset_statistics(self) -> None:
        """An optimizer step begins."""
        self.statistics = RouterStatistics(np.zeros(self.config.num_moe_experts))

    def forward(self, input: torch.Tensor, padding_mask: torch.Tensor | None = None):
        self._now = self._positions()
        experts = self._now.experts
        self.router_replay = None if experts is None else Replay(experts[:, self.moe_layer])
        # Megatron hands a padding mask through its layers too, but not divided by sequence parallelism on every stage.
        return super().forward(input, self._now.padding)

    def _positions(self) -> Positions:
        """Of the micro-batch in hand. A recomputation in the backward pass comes after later micro-batches' forward
        passes, but in the same order as their first passes."""
        if self.training and self.config.recompute_granularity == "full":
            if torch.is_grad_enabled():
                return self._again.popleft()
            self._again.append(self.context.positions)
        return self.context.positions

    def routing(self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None):
        probabilities, routing_map = super().routing(logits, padding_mask)
        if self.training and torch.is_grad_enabled():
            self._count(logits.detach().flatten(0, 1).float(), routing_map, padding_mask)
        return probabilities, routing_map

    def _count(self, logits: torch.Tensor, routing_map: torch.Tensor, padding: torch.Tensor) -> None:
        real = ~padding
        if self.score_function == "softmax":
            log_p = logits.log_softmax(-1)
        else:
            score = logits.sigmoid()
            log_p = (score / score.sum(-1, keepdim=True)).log()
        load = (routing_map & real[:, None]).sum(0)
        count = float(real.sum())
        self.statistics.add(RouterStatistics(
            load=load.double().cpu().numpy(), positions=count, dropped=count * self.topk - float(load.sum()),
            entropy=-float(((log_p.exp() * log_p).sum(-1) * real).sum())))

    def _apply_expert_bias(self, routing_map: torch.Tensor, padding_mask: torch.Tensor | None = None) -> None:
        """Megatron-core 0.16.1 multiplies [N, experts] by a mask [N], which fails for all but N = experts."""
        if self.enable_expert_bias and torch.is_grad_enabled():
            with torch.no_grad():
                self.local_tokens_per_expert += (routing_map & ~padding_mask[:, None]).sum(0)

    def attach_and_log_load_balancing_loss(
        self, activation: torch.Tensor, aux_loss_coeff: float, aux_loss: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Weighs a micro-batch's balancing loss by the tokens it trains on, as gradients are divided by their number.

        Megatron-core weighs it by all positions: prompts and observations, which nothing trains on, would inflate it.
        """
        self.statistics.aux_loss += float(aux_loss.detach()) * float((~self._now.padding).sum())
        return MoEAuxLossAutoScaler.apply(activation, aux_loss * self._now.trained)


def moe_layers(config: TransformerConfig) -> list[int]:
    """Indices of the model's mixture-of-experts layers."""
    frequency = config.moe_layer_freq
    pattern = frequency if isinstance(frequency, list) else [i % frequency == 0 for i in range(config.num_layers)]
    return [i for i, is_moe in enumerate(pattern) if is_moe]


def forget_last(chunks: Iterable[torch.nn.Module]) -> None:
    """Let go of what dispatchers keep of their last forward pass: its graph leads back to the model, by references
    that Python's garbage collection does not see, and keeps model and process groups alive for good."""
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, MoELayer):
                module.token_dispatcher.probs = module.token_dispatcher.routing_map = None


def routers(chunks: Iterable[torch.nn.Module]) -> list[Router]:
    """Of all mixture-of-experts layers of these model chunks, in the order of the model."""
    return [module for chunk in chunks for module in chunk.modules() if isinstance(module, Router)]

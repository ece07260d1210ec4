"""Metrics of a global batch from what each rank found in its micro-batches."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.distributed as dist
from megatron.core import parallel_state

from megatron_pbsd.learner.routing import Router, RouterStatistics
from megatron_pbsd.losses import LossOutput


def reduce(outputs: Sequence[tuple[int, LossOutput]], routers: Sequence[Router]) -> dict[str, float]:
    """Sums over the global batch per trained token, maxima, and router statistics; the same on every rank.

    outputs:  trained tokens and loss of each micro-batch, where this rank is on the last pipeline stage.
    """
    first = parallel_state.get_tensor_model_parallel_rank() == 0
    mine = _summed(outputs) if outputs and first else None
    # With sequence parallelism every tensor-parallel rank routes positions of its own.
    routed = {router.layer_number - 1: router.statistics for router in routers
              if first or router.config.sequence_parallel}
    gathered: list[tuple] = [()] * dist.get_world_size()
    dist.all_gather_object(gathered, (mine, routed))
    shares = [share for share, _ in gathered if share is not None]
    tokens = sum(count for count, _, _ in shares)
    found = {name: math.fsum(s[name] for _, s, _ in shares) / max(tokens, 1) for name in shares[0][1]}
    found |= {name: max(m[name] for _, _, m in shares) for name in shares[0][2]}
    layers: dict[int, RouterStatistics] = {}
    for layer, statistics in sorted((pair for _, held in gathered for pair in held.items()), key=lambda pair: pair[0]):
        if layer in layers:
            layers[layer].add(statistics)
        else:
            layers[layer] = statistics
    for layer, statistics in layers.items():
        found |= statistics.metrics(layer)
    return found | {"tokens": float(tokens)}


def _summed(outputs: Sequence[tuple[int, LossOutput]]) -> tuple[int, dict[str, float], dict[str, float]]:
    _, example = outputs[0]
    return (
        sum(count for count, _ in outputs),
        {name: math.fsum(float(o.sums[name]) for _, o in outputs) for name in example.sums},
        {name: max(float(o.maxima[name]) for _, o in outputs) for name in example.maxima})

"""Seconds that a learner takes for a step: computation, and communication by what it is for.

Computation: operations by `learner/cost.py` at the shares of the peak that matrix products and attention reach
(`hardware.py`), or the reading of the weights where that takes longer; what lies between them by its traffic to memory.
A pipeline waits for its slowest stage.
Communication: bytes over the busiest link at `hardware.LINKS` of its speed; none of it beside computation, but what
context parallelism sends during attention. Not counted: small products that are slower, imbalance of experts and of
micro-batches, data loading, launches.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil

from megatron_pbsd.learner.cost import Cost
from megatron_pbsd.models.decoder import Decoder
from megatron_pbsd.models.footprint import stage_buffers
from megatron_pbsd.planning.activations import kept
from megatron_pbsd.planning.hardware import Cluster
from megatron_pbsd.planning.memory import Layout, Numerics, Stage, stages, state_bytes

READ_AND_WRITTEN = (2, 4)
"""How often what a layer keeps goes to or from memory between matrix products, in a forward and in a backward pass:
once as it is made and once as it is used; as it is used again, and its gradient as it is made, added to and used.
Gradients of weights are written and read once more, as they are added to those of other micro-batches."""
OPTIMIZER_BYTES = 30
"""Read and written for each number by Adam: gradient; float32 copy and two moments, twice; parameter."""


@dataclass(frozen=True)
class Work:
    """Of a step. tokens: positions of all sequences. length: of a sequence. scored: forward passes before the update.
    updates: optimizer steps that the batch is divided over."""

    tokens: int
    length: int
    scored: int = 0
    updates: int = 1


def micro_batches(layout: Layout, work: Work) -> int:
    """Of a rank in an optimizer step."""
    parallel = layout.parallel
    needed = max(1, ceil(work.tokens / work.updates / (parallel.dp * parallel.cp) / layout.micro_batch_tokens))
    # The interleaved schedule takes pp micro-batches at a time.
    return needed if parallel.vpp == 1 else ceil(needed / parallel.pp) * parallel.pp


def operations(decoder: Decoder, work: Work) -> float:
    """Floating-point operations of a step's updates, without what is computed again."""
    cost = Cost.of(decoder)
    return work.tokens * (cost.linear + cost.quadratic * work.length)


def learner_seconds(
    decoder: Decoder, layout: Layout, numerics: Numerics, cluster: Cluster, work: Work
) -> dict[str, float]:
    """Of a step, by part: matrix products, attention, memory (what lies between them), tensor, context, expert and data
    parallelism, pipeline (filling it, and its messages), optimizer."""
    parallel = layout.parallel
    count = micro_batches(layout, work)
    # Micro-batches need not be full.
    tokens = work.tokens / work.updates / (parallel.dp * parallel.cp) / count
    passes = [_micro_batch(decoder, layout, numerics, cluster, tokens, work.length, stage)
              for stage in stages(decoder, parallel)]
    forward, backward = max(passes, key=lambda pair: sum(pair[0].values()) + sum(pair[1].values()))
    found = {name: work.updates * count * (forward[name] * (1 + work.scored) + backward[name]) for name in forward}
    sent = numerics.kernels.width * tokens * decoder.hidden_size / layout.shares.outside * parallel.vpp
    messages = 0.0
    if parallel.pp > 1:
        messages = work.updates * count * (2 + work.scored) * sent / cluster.ring(2, parallel.world_size // parallel.pp)
    found["pipeline"] = sum(found.values()) * (parallel.pp - 1) / parallel.vpp / count + messages
    data, optimizer = _update(decoder, layout, numerics, cluster)
    return found | {"data": work.updates * data, "optimizer": work.updates * optimizer}


@lru_cache(maxsize=4096)
def _cost(decoder: Decoder, plain: int, routed: int, last: bool) -> Cost:
    """Of layers without and with experts, and of the logits behind the last."""
    experts = decoder.experts and replace(decoder.experts, layers=(False,) * plain + (True,) * routed)
    return Cost.of(replace(decoder, num_hidden_layers=plain + routed, experts=experts), float(last))


def _micro_batch(
    decoder: Decoder, layout: Layout, numerics: Numerics, cluster: Cluster, tokens: float, length: int,
    stage: Stage,
) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of a rank for `tokens` positions of its own, by part: forward, backward."""
    plain, routed = stage.layers
    parallel, shares, gpu, width = layout.parallel, layout.shares, cluster.gpu, numerics.kernels.width
    cost = _cost(decoder, plain, routed, stage.last)
    weights = state_bytes(decoder, parallel, numerics, stage.index)["parameters"] / gpu.bandwidth
    products = max(weights, cost.linear / 3 * tokens / parallel.tp / (gpu.gemm * gpu.flops))
    attention = cost.quadratic / 3 * length * tokens / parallel.tp / (gpu.attention * gpu.flops)
    between = sum(count * sum(kept(decoder, kind, shares, numerics.kernels, "none", length).values())
                  for kind, count in ((False, plain), (True, routed)) if count) * tokens / gpu.bandwidth
    gradients = weights * (2 * numerics.parameter + 2 * numerics.gradient) / numerics.parameter
    hidden = width * decoder.hidden_size * tokens
    once = {"tensor": 0.0, "context": 0.0, "expert": 0.0}
    if parallel.tp > 1:
        once["tensor"] = _tensor_parallel_layers(decoder, plain, routed) * 2 * hidden * (
            1 - 1 / parallel.tp) / cluster.ring(parallel.tp, 1)
    if decoder.experts is not None and routed:
        chosen = hidden * decoder.experts.num_experts_per_tok / shares.outside
        if parallel.ep > 1:
            once["expert"] = 2 * routed * cluster.exchange(chosen, parallel.ep, parallel.etp)
        if parallel.etp > 1:
            once["expert"] += 2 * routed * chosen * (parallel.etp - 1) / cluster.ring(parallel.etp, 1)
    keys = 0.0
    if parallel.cp > 1:
        keys = (plain + routed) * width * tokens * _key_width(decoder) / parallel.tp * (parallel.cp - 1) / cluster.ring(
            parallel.cp, parallel.tp)
        once["context"] = max(0.0, keys - attention)
    forward = {"products": products, "attention": attention, "memory": READ_AND_WRITTEN[0] * between, **once}
    backward = {"products": 2 * products, "attention": 2 * attention, **once,
                "memory": READ_AND_WRITTEN[1] * between + gradients,
                "context": max(0.0, 2 * (keys - attention))}
    again = {"none": (), "selective": ("attention",), "full": tuple(forward)}[layout.recompute]
    return forward, {name: seconds + forward[name] * (name in again) for name, seconds in backward.items()}


def _tensor_parallel_layers(decoder: Decoder, plain: int, routed: int) -> int:
    """Pairs of layers, the first divided by columns and the second by rows: attention, MLP, shared experts. Each sends
    the hidden states twice in a pass; tokens go to experts from where they are."""
    shared = decoder.experts is not None and decoder.experts.shared_intermediate_size is not None
    return 2 * plain + (1 + shared) * routed


def _key_width(decoder: Decoder) -> int:
    """Numbers of keys and values of a token in a layer, as they are attended to."""
    latent = decoder.latent
    if latent is not None:
        return decoder.num_attention_heads * (latent.qk_head_dim + latent.v_head_dim)
    return 2 * decoder.num_key_value_heads * decoder.head_dim


@lru_cache(maxsize=8192)
def _update(decoder: Decoder, layout: Layout, numerics: Numerics, cluster: Cluster) -> tuple[float, float]:
    """Seconds of an optimizer step of the slowest stage: gradients summed and parameters brought together over
    data-parallel ranks, and Adam."""
    parallel = layout.parallel
    groups = {False: (parallel.dp * parallel.cp, parallel.tp), True: (parallel.expert_dp, parallel.etp * parallel.ep)}
    sent = numerics.gradient + numerics.parameter if numerics.divided else 2 * numerics.gradient
    data = optimizer = 0.0
    for stage in stages(decoder, parallel):
        seconds = numbers = 0.0
        for buffer in stage_buffers(decoder, parallel, stage.index):
            size, stride = groups[buffer.experts]
            numbers += buffer.numbers / (size if numerics.divided else 1)
            if size > 1:
                seconds += sent * buffer.numbers * (1 - 1 / size) / cluster.ring(size, stride)
        data, optimizer = max(data, seconds), max(optimizer, OPTIMIZER_BYTES * numbers / cluster.gpu.bandwidth)
    return data, optimizer

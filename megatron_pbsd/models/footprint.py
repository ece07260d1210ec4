"""How many numbers of a model each rank holds, of the learner and of SGLang servers: exact, and without its tensors.

Megatron-core lays the parameters of a model chunk end to end and pads them; layers of one kind are alike, so that one
of each is read off `mapping.py`, and the rest is counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from math import lcm, prod

from megatron_pbsd.config import ParallelConfig
from megatron_pbsd.models import mapping, sglang
from megatron_pbsd.models.decoder import Decoder
from megatron_pbsd.models.parameters import RankCoordinates, local_shape, stage_layers
from megatron_pbsd.models.sglang import ServerParallel

PARAMETER_ALIGNMENT, BUCKET_ALIGNMENT = 64, 128
"""Megatron-core 0.16.1, `_ParamAndGradBuffer`: in elements, with the distributed optimizer alone."""
FIRST = RankCoordinates(tp=0, cp=0, dp=0, pp=0, etp=0, ep=0, expert_dp=0)
Sizes = Counter[int]
"""Numbers of a parameter → how many parameters have so many."""


@dataclass(frozen=True)
class Buffer:
    """Parameters of a model chunk that Megatron lays end to end. experts: data-parallel ranks are those of experts.
    alone: those among `sizes` that have a bucket of their own."""

    sizes: Sizes
    experts: bool
    alone: Sizes = field(default_factory=Counter)

    @property
    def parameters(self) -> int:
        return self.sizes.total()

    @cached_property
    def numbers(self) -> int:
        return sum(size * count for size, count in self.sizes.items())

    @cached_property
    def _together(self) -> int:
        """Numbers that share a bucket, each parameter aligned."""
        return sum(_round_up(size, PARAMETER_ALIGNMENT) * count for size, count in (self.sizes - self.alone).items())

    def padded(self, replicas: int) -> int:
        """Numbers with what aligns parameters and buckets, so that `replicas` ranks have equal parts."""
        bucket = lcm(replicas, BUCKET_ALIGNMENT)
        return _round_up(self._together, bucket) + sum(
            _round_up(_round_up(size, PARAMETER_ALIGNMENT), bucket) * count for size, count in self.alone.items())


def stage_buffers(decoder: Decoder, parallel: ParallelConfig, pp: int, value_head: bool = False) -> list[Buffer]:
    """Of each model chunk of a rank of pipeline stage `pp`; ranks of a stage have equal shares. ModelError when the
    model cannot be divided like this."""
    buffers: list[Buffer] = []
    for chunk in range(parallel.vpp):
        layers = stage_layers(decoder.num_hidden_layers, parallel, pp, chunk)
        experts = sum(decoder.has_experts(layer) for layer in layers)
        first, last = pp == chunk == 0, (pp, chunk) == (parallel.pp - 1, parallel.vpp - 1)
        buffers += _chunk(decoder, parallel.tp, parallel.ep, parallel.etp, len(layers) - experts, experts, first, last,
                          value_head and last)
    return buffers


@lru_cache(maxsize=4096)
def _chunk(decoder: Decoder, tp: int, ep: int, etp: int, plain: int, routed: int, first: bool, last: bool,
           value_head: bool) -> tuple[Buffer, ...]:
    """Of a model chunk with so many layers without and with experts."""
    dense: Sizes = Counter()
    experts: Sizes = Counter()
    alone: Sizes = Counter()
    for kind, layers in ((False, plain), (True, routed)):
        for name, size in _sample(decoder, tp, ep, etp, kind).items() if layers else ():
            if name.startswith("decoder.layers."):
                (experts if ".mlp.experts." in name else dense)[size] += layers
    ends = _sample(decoder, tp, ep, etp, routed > 0)
    if first:
        dense[ends["embedding.word_embeddings.weight"]] += 1
    if last:
        dense[ends["decoder.final_layernorm.weight"]] += 1
        if not (first and decoder.tie_word_embeddings):
            dense[ends["output_layer.weight"]] += 1
        if value_head:
            dense[decoder.hidden_size] += 1
            dense[1] += 1
    if decoder.tie_word_embeddings and first != last:
        alone[ends["output_layer.weight"]] += 1
    return (Buffer(dense, False, alone), *([Buffer(experts, True)] if experts else []))


@lru_cache(maxsize=1024)
def _sample(decoder: Decoder, tp: int, ep: int, etp: int, routed: bool) -> Mapping[str, int]:
    """Numbers of each parameter of a rank that has all of a model with one layer of a kind."""
    experts = decoder.experts and replace(decoder.experts, layers=(routed,))
    one = replace(decoder, num_hidden_layers=1, experts=experts, tie_word_embeddings=False)
    parallel = ParallelConfig(world_size=tp * ep * etp, tp=tp, ep=ep, etp=etp)
    return {name: prod(local_shape(pieces)) for name, pieces in mapping.pieces(one, parallel, FIRST, 0).items()
            if not name.endswith(".expert_bias")}


@lru_cache(maxsize=64)
def server_numbers(decoder: Decoder, server: ServerParallel) -> int:
    """Of the weights on the rank of an SGLang server that has most."""
    return max(sum(prod(local_shape(pieces)) for pieces in sglang.pieces(decoder, server, 0, stage).values())
               for stage in range(server.pp))


def server_kv(decoder: Decoder, server: ServerParallel) -> int:
    """Numbers that a rank of an SGLang server keeps of each token in all layers: each rank has at least one head, and
    latents whole. A pipeline stage keeps its layers' share."""
    each = (2 * max(1, decoder.num_key_value_heads // server.attention_tp) * decoder.head_dim if decoder.latent is None
            else decoder.latent.kv_lora_rank + decoder.latent.qk_rope_head_dim)
    return decoder.num_hidden_layers * each


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple

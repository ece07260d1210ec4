"""Bytes on each GPU, by owner and phase of a step: of a learner's ranks, of SGLang servers, and of both together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

from megatron_pbsd.config import ParallelConfig, RunConfig
from megatron_pbsd.handover import PHASES, held
from megatron_pbsd.models.decoder import Decoder
from megatron_pbsd.models.footprint import server_kv, server_numbers, stage_buffers
from megatron_pbsd.models.parameters import stage_layers
from megatron_pbsd.models.sglang import ServerParallel
from megatron_pbsd.planning.activations import Kernels, Recompute, Shares, in_flight, kept, logits, working
from megatron_pbsd.planning.hardware import RESERVED, Cluster, Gpu

MIB = 2**20
PASSING = ("activations", "logits", "working")
"""What a learner has during its passes alone."""


@dataclass(frozen=True)
class Numerics:
    """Bytes of a number: of a parameter, its gradient, the optimizer's float32 copy of it, and Adam's moments.

    divided: copy and moments are divided over data-parallel ranks. offloaded: they are in host memory.
    """

    parameter: int = 2
    gradient: int = 4
    master: int = 4
    moments: int = 8
    divided: bool = True
    offloaded: bool = False
    kernels: Kernels = field(default_factory=Kernels)


@dataclass(frozen=True)
class Layout:
    """sequence: sequence parallelism. micro_batch_tokens: positions of a rank in a micro-batch."""

    parallel: ParallelConfig
    micro_batch_tokens: int
    recompute: Recompute = "none"
    logits_tokens: int = 1024
    sequence: bool = False

    @cached_property
    def shares(self) -> Shares:
        return Shares(self.parallel.tp, self.parallel.etp, self.sequence)


@dataclass(frozen=True)
class Stage:
    """A pipeline stage. chunks: layers of each of its model chunks without experts, and with them."""

    index: int
    chunks: tuple[tuple[int, int], ...]
    last: bool

    @property
    def layers(self) -> tuple[int, int]:
        return sum(plain for plain, _ in self.chunks), sum(routed for _, routed in self.chunks)


@lru_cache(maxsize=65536)
def stages(decoder: Decoder, parallel: ParallelConfig) -> tuple[Stage, ...]:
    """Of each kind the first, which keeps the activations of most micro-batches; the first and the last by themselves.
    """
    found: dict[tuple, Stage] = {}
    for index in range(parallel.pp):
        held = [stage_layers(decoder.num_hidden_layers, parallel, index, chunk) for chunk in range(parallel.vpp)]
        routed = [sum(map(decoder.has_experts, layers)) for layers in held]
        stage = Stage(index, tuple((len(layers) - n, n) for layers, n in zip(held, routed, strict=True)),
                      index == parallel.pp - 1)
        found.setdefault((stage.chunks, index == 0, stage.last), stage)
    return tuple(found.values())


@lru_cache(maxsize=65536)
def state_bytes(
    decoder: Decoder, parallel: ParallelConfig, numerics: Numerics, stage: int, value_head: bool = False
) -> dict[str, float]:
    """Of a rank of a pipeline stage, whatever it computes: parameters, gradients and optimizer."""
    replicas = {False: parallel.dp * parallel.cp, True: parallel.expert_dp}
    buffers = stage_buffers(decoder, parallel, stage, value_head)
    numbers = sum(b.padded(replicas[b.experts]) if numerics.divided else b.numbers for b in buffers)
    optimized = sum(b.numbers / (replicas[b.experts] if numerics.divided else 1) for b in buffers)
    on_device = 0 if numerics.offloaded else optimized
    return {"parameters": numerics.parameter * numbers, "gradients": numerics.gradient * numbers,
            "master_weights": numerics.master * on_device, "optimizer_state": numerics.moments * on_device}


def passing_bytes(
    decoder: Decoder, layout: Layout, numerics: Numerics, stage: Stage, micro_batches: int, length: int = 0
) -> dict[str, float]:
    """Of a rank of a pipeline stage at the peak of its passes: what they keep for the backward pass, the loss's
    logits, and what the largest of a layer's and the loss's backward passes works with.

    length: of sequences, for kernels that keep the scores of attention.
    """
    pp, vpp, shares, kernels = layout.parallel.pp, layout.parallel.vpp, layout.shares, numerics.kernels
    tokens, recompute = layout.micro_batch_tokens, layout.recompute
    passes = in_flight(pp, stage.index, vpp, micro_batches)
    rounds, rest = divmod(passes, pp * vpp)
    activations = most = 0.0
    for chunk, counts in enumerate(stage.chunks):
        # The interleaved schedule takes pp micro-batches through each chunk in turn; the plain one any number.
        times = passes if vpp == 1 else rounds * pp + min(max(rest - chunk * pp, 0), pp)
        for routed, count in enumerate(counts):
            if count:
                layer = sum(kept(decoder, bool(routed), shares, kernels, recompute, length).values())
                activations += tokens * times * count * layer
                most = max(most, tokens * working(decoder, bool(routed), shares, kernels, recompute, length))
    head = logits(decoder, tokens, layout.logits_tokens, shares, kernels) if stage.last else (0.0, 0.0)
    return {"activations": activations, "logits": head[0] + max(head[1] - most, 0.0), "working": most}


def learner_bytes(
    decoder: Decoder, layout: Layout, numerics: Numerics, micro_batches: int, *, value_head: bool = False,
    length: int = 0,
) -> list[dict[str, float]]:
    """Of a rank of each of `stages`: the categories of `learner.memory`, and `PASSING`."""
    return [state_bytes(decoder, layout.parallel, numerics, stage.index, value_head)
            | passing_bytes(decoder, layout, numerics, stage, micro_batches, length)
            for stage in stages(decoder, layout.parallel)]


@dataclass(frozen=True)
class Engine:
    """A GPU of an engine. held: bytes by the tags of the engines' memory. graphs: of CUDA graphs, which stay.
    kv_tokens: of which each of its `replicas` of attention has room for KV."""

    gpus: int
    held: Mapping[str, float]
    graphs: float
    kv_tokens: float
    replicas: int = 1

    @property
    def fits(self) -> bool:
        return self.held["kv_cache"] > 0


def sglang_engine(decoder: Decoder, server: ServerParallel, args: Mapping[str, Any], gpu: Gpu, slots: int,
                  width: int) -> Engine:
    """Of a rank of an SGLang server. KV has the tokens that are asked for, or what `mem_fraction_static` of the GPU
    leaves beside weights. CUDA graphs take what SGLang 0.5 sets aside for them: 2 MiB for each sequence, and with
    replicas of attention 3 MiB for each and replica, half as much again from 300 on."""
    weights = width * server_numbers(decoder, server)
    token = width * server_kv(decoder, server) / server.pp
    sequences = 0 if args.get("disable_cuda_graph") else int(args.get("cuda_graph_max_bs", min(slots, 512)))
    padding = 0.0 if server.dp_attention == 1 else (3 if sequences <= 300 else 4.5) * server.dp_attention
    graphs = (2 + padding) * MIB * sequences
    asked = args.get("max_total_tokens")
    pool = token * asked if asked else static_share(gpu, server, args, graphs) * gpu.memory - weights
    return Engine(server.size, {"weights": weights, "kv_cache": pool}, graphs, max(pool, 0) / token,
                  server.dp_attention)


def static_share(gpu: Gpu, server: ServerParallel, args: Mapping[str, Any], graphs: float) -> float:
    """Share of a GPU's memory for weights and KV: `mem_fraction_static`, or what SGLang 0.5.23 leaves to them
    (`memory_hook.py`): all but 512 MiB, 1.5 MiB for each token of a prefill, 128 MiB for each rank of the server and
    what graphs take; at least 10 GiB of a large GPU are not theirs."""
    if given := args.get("mem_fraction_static"):
        return float(given)
    large = gpu.memory > 60 * 2**30
    prefill = max(int(args.get("chunked_prefill_size", 8192 if large else 4096)), 2048)
    apart = (512 + 1.5 * prefill + 128 * server.size) * MIB + graphs
    return 1 - max(apart, 10 * 2**30 if large else 0) / gpu.memory


def by_phase(
    config: RunConfig, learner: Mapping[str, float], engine: Engine | None, buckets: float, colocated: bool
) -> dict[str, dict[str, float]]:
    """Phase → owner → bytes, on a GPU of the learner that an engine shares; if none does, on a GPU of whoever works in
    the phase, and of a publication on the fuller one.

    buckets: of weights on their way, in the memory of learner and engine.
    """
    found = {}
    for phase in PHASES:
        categories, tags = held(phase, config)
        ours = {f"learner {name}": nbytes for name, nbytes in learner.items()
                if name in categories or (name in PASSING and phase == "train")}
        ours["learner context"] = RESERVED
        theirs: dict[str, float] = {}
        if engine is not None:
            theirs = {f"engine {tag}": engine.held[tag] for tag in tags if engine.held[tag] > 0}
            theirs |= {"engine cuda_graphs": engine.graphs, "engine context": RESERVED}
        if phase == "publish":
            ours["learner buckets"] = buckets
            if theirs:
                theirs["engine buckets"] = buckets
        if colocated or not theirs:
            found[phase] = ours | theirs
        else:
            sides = {"train": [ours], "save": [ours], "rollout": [theirs]}.get(phase, [ours, theirs])
            found[phase] = max(sides, key=lambda side: sum(side.values()))
    return found


def bucket_bytes(decoder: Decoder, config: RunConfig, width: int) -> float:
    """Of two buckets on a GPU, for the transports that have them there; a larger tensor has a bucket to itself."""
    transport = config.rollout.transport
    if transport.kind not in ("ipc", "collective"):
        return 0.0
    largest = width * max(decoder.vocab_size, decoder.intermediate_size) * decoder.hidden_size
    return 2.0 * max(transport.bucket_mb * MIB, largest)


def overfull(phases: Mapping[str, Mapping[str, float]], cluster: Cluster) -> dict[str, float]:
    """Phase → bytes that are more than a GPU has for tensors and processes."""
    excess = {phase: sum(owners.values()) - cluster.available for phase, owners in phases.items()}
    return {phase: nbytes for phase, nbytes in excess.items() if nbytes > 0}

"""What a run holds in memory in each phase of a step, by owner: from the configuration and the model's shapes alone.

Bytes are those of all processes together. `UNPREDICTED` is what they do not include.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from megatron_pbsd.config import LearnerConfig, RunConfig, TransportConfig
from megatron_pbsd.credit import loss_of
from megatron_pbsd.handover import PHASES, held
from megatron_pbsd.learner.categories import CATEGORIES
from megatron_pbsd.models import family, sglang
from megatron_pbsd.models.decoder import Decoder, kept_in_float32
from megatron_pbsd.models.footprint import server_kv, stage_buffers
from megatron_pbsd.models.parameters import coordinates, local_shape
from megatron_pbsd.models.shape import config_of
from megatron_pbsd.platform import Platform
from megatron_pbsd.resharding.manifest import layout
from megatron_pbsd.resharding.stream import described, divided, plan_for, slots
from megatron_pbsd.rollout.engines.embedded.padding import padded_keys

UNPREDICTED = (
    "activations and logits of the learner's passes and of the engines', what allocators keep of them",
    "interpreters, libraries, CUDA contexts, buffers of collectives",
    "the reference engine of a KL penalty, and the environment",
    "copies that a checkpoint in the background makes",
)
FLOAT32, STEP = 4, 4
"""torch's Adam counts its steps in a float32 for each parameter."""


@dataclass(frozen=True)
class Owner:
    """name: e.g. 'learner gradients'. nbytes: of all its processes, `processes` of them, of which the largest holds
    `largest`. part: learner category or engine tag, None for what stays."""

    name: str
    nbytes: int
    processes: int
    largest: int
    part: str | None = None


@dataclass(frozen=True)
class Phase:
    """What is on the device, or among the processes' own memory on a CPU, and what waits in host memory for another
    phase. On a CPU both are the same memory."""

    held: Mapping[str, int]
    waiting: Mapping[str, int]

    @property
    def device(self) -> int:
        return sum(self.held.values())

    @property
    def total(self) -> int:
        return self.device + sum(self.waiting.values())


@dataclass(frozen=True)
class Account:
    """phases: by name. shared: bytes of weights on their way, in shared memory, the same in all phases.
    at_most: owners that take what they need, up to this. unknown: owners that cannot be predicted, and why.
    device: 'cpu' or 'cuda'."""

    device: str
    owners: tuple[Owner, ...]
    phases: Mapping[str, Phase]
    shared: int
    at_most: Mapping[str, int]
    unknown: Mapping[str, str]

    def of(self, phase: str) -> int:
        """Bytes of a phase in the processes' own memory on a CPU, where what waits takes as much; on the devices."""
        return self.phases[phase].total if self.device == "cpu" else self.phases[phase].device


def predict(config: RunConfig, platform: Platform) -> Account:
    """ModelError when the model cannot be read, or divided like this."""
    hf = config_of(config.model)
    ranks = learner_bytes(hf, config.learner, platform, has_value_head(config))
    owners = [Owner(f"learner {name}", sum(rank[name] for rank in ranks), len(ranks), max(r[name] for r in ranks), name)
              for name in CATEGORIES if name in ranks[0]]
    moving = moving_bytes(hf, config.learner, config.rollout.transport, platform)
    in_segment = config.rollout.transport.kind in ("segment", "buckets", "disk")
    engine, unknown = engine_bytes(hf, config, platform)
    count = config.rollout.engines
    owners += [Owner(f"engine {tag}", count * nbytes, count, nbytes, tag) for tag, nbytes in engine.items()]
    at_most = {}
    if config.rollout.engine == "embedded":
        at_most["engine kv_pool"] = count * config.rollout.kv_pool_mb * 2**20
    if not in_segment:
        at_most["buckets of weights, at learner rank 0"] = moving
    return Account(platform.name, tuple(owners), {name: _phase(name, owners, config) for name in PHASES},
                   moving if in_segment else 0, at_most, unknown)


def _phase(name: str, owners: list[Owner], config: RunConfig) -> Phase:
    categories, tags = held(name, config)
    here = {owner.name: owner.nbytes for owner in owners if owner.part in (*categories, *tags)}
    # Gradients are dropped, as is what engines give away.
    waiting = {owner.name: owner.nbytes for owner in owners if owner.name not in here
               and owner.part in CATEGORIES and owner.part != "gradients"}
    return Phase(here, waiting)


def has_value_head(config: RunConfig) -> bool:
    return config.algorithm.name != "sft" and "values" in loss_of(config, on_policy=False).outputs


def learner_bytes(
    hf: Mapping[str, Any], config: LearnerConfig, platform: Platform, value_head: bool
) -> list[dict[str, int]]:
    """For each rank the bytes on its device by category of `learner.memory`, once it has made an optimizer step.

    With an optimizer divided over data-parallel ranks its state is that of all of them over their number: each rank's
    is that to within a parameter.
    """
    parallel = config.parallel
    divided = platform.distributed_optimizer if config.distributed_optimizer is None else config.distributed_optimizer
    width = platform.dtype(config.precision).itemsize
    # Ranks of a pipeline stage have equal shares.
    decoder = family(hf).decoder(hf)
    stages = [stage_buffers(decoder, parallel, pp, value_head) for pp in range(parallel.pp)]
    replicas = {False: parallel.dp * parallel.cp, True: parallel.expert_dp}
    found = []
    for rank in range(parallel.world_size):
        buffers = stages[coordinates(parallel, rank).pp]
        numbers = sum(buffer.numbers for buffer in buffers)
        padded = sum(buffer.padded(replicas[buffer.experts]) for buffer in buffers) if divided else numbers
        optimized = sum(b.numbers / (replicas[b.experts] if divided else 1) for b in buffers)
        steps = sum(buffer.parameters for buffer in buffers) if platform.name == "cpu" else 0
        found.append({
            "parameters": width * padded, "gradients": FLOAT32 * padded,
            "master_weights": round(FLOAT32 * optimized) if width < FLOAT32 else 0,
            "optimizer_state": round(2 * FLOAT32 * optimized) + STEP * steps})
    return found


def moving_bytes(
    hf: Mapping[str, Any], config: LearnerConfig, transport: TransportConfig, platform: Platform
) -> int:
    """Of weights on their way: of the whole model, or of two buckets (`rollout.transport`)."""
    dtype = str(platform.dtype(config.precision)).removeprefix("torch.")
    found = family(hf)
    tensors = {name: ("float32" if kept_in_float32(name) else dtype, shape)
               for name, shape in found.hf_tensors(hf).items()}
    if transport.kind == "segment":
        return layout("", tensors).nbytes
    plan = plan_for(found.decoder(hf), config.parallel, tensors, transport.bucket_mb << 20)
    count, nbytes = slots([described(transfers) for transfers in divided(plan)])
    return count * nbytes


def engine_bytes(
    hf: Mapping[str, Any], config: RunConfig, platform: Platform
) -> tuple[dict[str, int], dict[str, str]]:
    """Of one engine by tag, all of its processes; and what cannot be said."""
    found, rollout = family(hf), config.rollout
    decoder = found.decoder(hf)
    if rollout.engine == "embedded":
        weights = FLOAT32 * sum(map(prod, found.hf_tensors(hf).values()))
        tokens = (rollout.slots + 1) * padded_keys(rollout.max_context)
        return {"weights": weights, "kv_cache": tokens * _embedded_kv(decoder, config.learner.moe.routing_replay)}, {}
    width = platform.dtype(config.learner.precision).itemsize
    server = sglang.server_of(rollout.sglang.args)
    weights = width * sum(
        prod(local_shape(pieces)) for stage in range(server.pp) for rank in range(server.tp)
        for pieces in sglang.pieces(decoder, server, rank, stage).values())
    tokens = rollout.sglang.args.get("max_total_tokens")
    if tokens is None:
        return {"weights": weights}, {"engine kv_cache": "rollout.sglang.args.max_total_tokens does not say how many "
                                      "tokens it has room for: SGLang takes what mem_fraction_static leaves"}
    return {"weights": weights, "kv_cache": tokens * width * server.tp * server_kv(decoder, server)}, {}


def _embedded_kv(decoder: Decoder, experts: bool) -> int:
    """Bytes of a token: float32 keys and values as attention meets them, which are equally wide, and int16 experts that
    are recorded."""
    latent, layers = decoder.latent, decoder.num_hidden_layers
    numbers = (2 * decoder.num_key_value_heads * decoder.head_dim if latent is None
               else 2 * decoder.num_attention_heads * max(latent.qk_head_dim, latent.v_head_dim))
    recorded = 0 if decoder.experts is None or not experts else (
        2 * sum(decoder.experts.layers) * decoder.experts.num_experts_per_tok)
    return FLOAT32 * layers * numbers + recorded


def rows(account: Account) -> Iterator[tuple[str, dict[str, int]]]:
    """Each owner's bytes by phase, what is in shared memory included."""
    for owner in account.owners:
        yield owner.name, {name: phase.held.get(owner.name, 0) for name, phase in account.phases.items()}
    yield "weights on their way, in shared memory", dict.fromkeys(account.phases, account.shared)
    yield "of the learner, waiting in host memory", {
        name: sum(phase.waiting.values()) for name, phase in account.phases.items()}

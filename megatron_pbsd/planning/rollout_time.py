"""Seconds of a step's rollouts, by the simulator, and of a publication, by the plan of its transfers."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_pbsd.config import ParallelConfig, RolloutConfig
from megatron_pbsd.learner.cost import Cost
from megatron_pbsd.models.decoder import Decoder
from megatron_pbsd.models.sglang import ServerParallel
from megatron_pbsd.planning.hardware import LINKS, Cluster
from megatron_pbsd.planning.memory import Engine
from megatron_pbsd.resharding.layouts import embedded_layout, learner_layout, server_layout
from megatron_pbsd.resharding.plan import Link, make_plan
from megatron_pbsd.simulation.experiment import simulate
from megatron_pbsd.simulation.workload import (
    EngineFacts,
    HardwareFacts,
    ModelFacts,
    RequestFacts,
    Workload,
    jobs,
)

OVERHEAD_S = 0.011
"""Of an engine's step beyond reading weights and KV: what was fitted to the newest of the published rollouts that
docs/simulation.md reproduces, Kimi-K2's."""
SEED = 1


@dataclass(frozen=True)
class Fleet:
    """Engines. server: None where each has the model whole. width: bytes of a weight."""

    count: int
    engine: Engine
    server: ServerParallel | None
    width: int
    colocated: bool


def lengths(rollout: RolloutConfig, mean: int | None) -> tuple[int, int]:
    """Tokens of a prompt, at most what generation leaves of the context; mean number of tokens generated, half of what
    can be unless it is given."""
    limit = rollout.most_generated
    return max(1, rollout.max_context - limit), min(mean or max(1, limit // 2), limit)


def rollout_seconds(rollout: RolloutConfig, decoder: Decoder, fleet: Fleet, cluster: Cluster, mean: int) -> float:
    """Of all trajectories of a step, one turn each, with the configured policy; tools take no time."""
    gpu, engine = cluster.gpu, fleet.engine
    prompt, _ = lengths(rollout, mean)
    # On all GPUs together; those of other replicas have none of it.
    token = engine.held["kv_cache"] / engine.kv_tokens * engine.gpus / engine.replicas
    workload = Workload(
        name="plan", engines=fleet.count, chunk_tokens=rollout.longest_chunk or rollout.most_generated,
        model=ModelFacts(
            parameters=engine.held["weights"] * engine.gpus / fleet.width,
            active_parameters=Cost.of(decoder).linear / 6, weight_bytes=fleet.width, kv_bytes_per_token=token),
        hardware=HardwareFacts(gpus=engine.gpus, memory_bytes=gpu.memory, bandwidth=gpu.bandwidth, flops=gpu.flops,
                               pool_bandwidth=gpu.network),
        engine=EngineFacts(
            slots=rollout.slots, overhead_s=OVERHEAD_S,
            memory_share=min(1.0, (engine.held["weights"] + engine.held["kv_cache"]) / gpu.memory)),
        requests=RequestFacts(
            groups=rollout.prompts_in_flight, group_size=rollout.group_size, limit=rollout.most_generated,
            mean=mean, prompt=prompt))
    return simulate(workload, rollout.policy, jobs(workload.requests, SEED), SEED).total_s


def publication_seconds(decoder: Decoder, parallel: ParallelConfig, fleet: Fleet, cluster: Cluster,
                        bucket_bytes: int) -> float:
    """Of the busiest link when every rank sends what `resharding/plan.py` has it send."""
    offset = 0 if fleet.colocated else parallel.world_size
    target = (embedded_layout(decoder, fleet.count, offset) if fleet.server is None
              else server_layout(decoder, fleet.server, fleet.count, offset))
    dtype = {2: "bfloat16", 4: "float32"}[fleet.width]
    plan = make_plan(learner_layout(decoder, parallel), target, source_dtype=dtype, target_dtype=dtype,
                     devices_per_node=cluster.per_node, bucket_bytes=bucket_bytes)
    speeds = {Link.DEVICE: cluster.gpu.bandwidth / 2, Link.NODE: LINKS * cluster.gpu.node,
              Link.NETWORK: LINKS * cluster.gpu.network}
    return max(float(max(plan.sent(link).max(), plan.received(link).max())) / speed for link, speed in speeds.items())

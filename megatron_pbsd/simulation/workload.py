"""A workload: model, hardware, requests, and what a paper measured on it. One YAML file; docs/simulation.md."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field

from megatron_pbsd.config.section import Fraction, Positive, PositiveInt, Section

NonNegative = Annotated[float, Field(ge=0.0)]
Count = Annotated[int, Field(ge=0)]


class ModelFacts(Section):
    parameters: Positive
    """All parameters."""
    active_parameters: Positive
    """Parameters that one token is multiplied with."""
    weight_bytes: Positive
    """Bytes per parameter."""
    kv_bytes_per_token: Positive
    """Bytes of KV per token, all layers."""


class HardwareFacts(Section):
    gpus: PositiveInt
    """GPUs of one engine."""
    memory_bytes: Positive = 80e9
    """Per GPU."""
    bandwidth: Positive = 3.35e12
    """Bytes per second between a GPU and its memory."""
    flops: Positive = 989e12
    """Dense bf16, per GPU."""
    pool_bandwidth: Positive = 50e9
    """Bytes per second at which one engine gets KV from the pool."""


class EngineFacts(Section):
    slots: PositiveInt = 256
    """Most sequences in a batch."""
    memory_share: Fraction = 0.8
    """Part of the memory that weights and KV may take."""
    bandwidth_share: Fraction = 0.7
    """Part of the bandwidth that decoding reaches."""
    flops_share: Fraction = 0.5
    """Part of the FLOP/s that verification and prefill reach."""
    kv_copies: PositiveInt = 1
    """GPUs of an engine that keep the same KV: tensor parallelism does not divide that of latent attention."""
    watermark: Fraction = 0.01
    """Part of the KV memory that an engine which admits requests on its own keeps free when it does."""
    overhead_s: NonNegative
    """Seconds per step beyond reading weights and KV: launches, collectives, sampling. Fitted."""


class RequestFacts(Section):
    groups: PositiveInt
    group_size: PositiveInt
    limit: PositiveInt
    """Most tokens a request generates."""
    mean: Positive
    """Mean number of tokens a request generates."""
    prompt: PositiveInt = 1024
    """Tokens of every prompt."""
    sigma: Positive = 0.8
    """Standard deviation of the logarithm of lengths before they are cut off at `limit`. Fitted."""
    correlation: Fraction = 0.9
    """Part of the variance of log lengths that is the prompt's."""
    outlier: Positive = 1.0
    """How much longer than by the rest one member of each group is, before lengths are cut off at `limit`."""
    turns: PositiveInt = 1
    """Turns of a trajectory, of equal lengths."""
    tool_s: NonNegative = 0.0
    """Median time between two turns."""
    tool_sigma: NonNegative = 0.5
    """Standard deviation of that time's logarithm."""
    observation: Count = 0
    """Tokens that a tool adds to the context."""


class Published(Section):
    """What a paper measured of one policy; None: it does not say."""

    throughput_rel: float | None = None
    total_s: float | None = None
    tail_s: float | None = None


class Workload(Section):
    name: str
    engines: PositiveInt
    chunk_tokens: PositiveInt = 2048
    """Longest chunk of policies that divide."""
    model: ModelFacts
    hardware: HardwareFacts
    engine: EngineFacts
    requests: RequestFacts
    published: dict[str, Published] = {}
    """By policy."""
    policies: tuple[str, ...] = ()
    """Which to simulate, beside the baseline; none: all."""
    seeds: PositiveInt = 3
    """Draws of lengths that results are means over."""
    seed: int = 0
    """The first of them."""


@dataclass(frozen=True)
class Job:
    """One trajectory. turns: tokens of each; tool_s: seconds after each turn but the last."""

    request_id: str
    group_id: str
    prompt: int
    turns: tuple[int, ...]
    tool_s: tuple[float, ...]
    observation: int = 0

    @property
    def tokens(self) -> int:
        return sum(self.turns)


def jobs(facts: RequestFacts, seed: int, epoch: int = 0) -> list[Job]:
    """Group by group. The same standard normals for all parameters, so that sweeps compare like with like; another
    epoch has the same prompts, and other answers to them."""
    shape = facts.groups, facts.group_size
    of_group = np.random.default_rng([seed, 0]).standard_normal(facts.groups)
    of_member = np.random.default_rng([seed, 1, epoch]).standard_normal(shape)
    share = facts.correlation
    z = share ** 0.5 * of_group[:, None] + (1 - share) ** 0.5 * of_member
    deviations = facts.sigma * z
    members = np.random.default_rng([seed, 3, epoch]).integers(facts.group_size, size=facts.groups)
    deviations[np.arange(facts.groups), members] += np.log(facts.outlier)
    lengths = cut_lognormal(deviations, facts.mean, facts.limit)
    latencies = np.random.default_rng([seed, 2, epoch]).lognormal(
        np.log(max(facts.tool_s, 1e-9)), facts.tool_sigma, (*shape, facts.turns - 1))
    return [
        Job(f"{g}/{i}", f"{g}", facts.prompt, tuple(divided(int(lengths[g, i]), facts.turns)),
            tuple(latencies[g, i].tolist()), facts.observation)
        for g in range(facts.groups) for i in range(facts.group_size)]


def cut_lognormal(deviations: np.ndarray, mean: float, limit: int) -> np.ndarray:
    """Whole numbers `min(exp(location + deviation), limit)`, at least 1, whose mean is `mean`: the location is found by
    bisection."""
    low, high = -50.0, 50.0
    for _ in range(80):
        middle = (low + high) / 2
        found = np.clip(np.exp(np.clip(middle + deviations, -50, 50)), 1, limit).mean()
        low, high = (middle, high) if found < mean else (low, middle)
    return np.clip(np.rint(np.exp(np.clip(low + deviations, -50, 50))), 1, limit).astype(np.int64)


def divided(total: int, parts: int) -> list[int]:
    """Nearly equal positive parts; fewer of them when there is not enough for all."""
    parts = min(parts, total)
    return [total // parts + (i < total % parts) for i in range(parts)]

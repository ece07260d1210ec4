"""What no schedule can be faster than, without speculation: a few sums that share nothing with the simulation but the
cost model's constants. They say what stops a policy, and the simulation is checked against them."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_pbsd.simulation.cost import CostModel
from megatron_pbsd.simulation.workload import Job


def kv_reads(job: Job) -> int:
    """Tokens of KV read while a job is decoded: the context before each of its tokens, summed."""
    total, context = 0, job.prompt
    for tokens in job.turns:
        total += tokens * context + tokens * (tokens - 1) // 2
        context += tokens + job.observation
    return total


def bounds(jobs: Sequence[Job], cost: CostModel, engines: int, slots: int) -> dict[str, float]:
    """Seconds. longest_request: one job alone on an engine, tools included. work: all tokens, in batches that fill all
    slots. kv_capacity: the same in batches that fill the KV memory, as each step reads no more than fits."""
    tokens, reads = sum(job.tokens for job in jobs), sum(map(kv_reads, jobs))
    work = cost.per_token * tokens + cost.per_kv * reads + cost.per_prefill * sum(job.prompt for job in jobs)
    return {
        "longest_request": max(
            job.tokens * (cost.step + cost.per_token) + cost.per_kv * kv_reads(job) + sum(job.tool_s) for job in jobs),
        "work": (work + cost.step * tokens / slots) / engines,
        "kv_capacity": (work + cost.step * reads / cost.kv_tokens) / engines}

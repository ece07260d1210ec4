"""What a step of an engine costs: reading the weights, computing its tokens, reading their KV, and an overhead."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_pbsd.simulation.workload import Workload


@dataclass(frozen=True)
class CostModel:
    """A step that computes v tokens over k tokens of KV takes `step + per_token · v + per_kv · k` seconds.

    step:         seconds per step: overhead, and the weights' reading.
    per_token:    seconds per token that is computed (decoded or verified).
    per_kv:       seconds per token of KV that is read.
    per_prefill:  seconds per token of prefill.
    per_pull:     seconds per token of KV that comes from the pool.
    kv_tokens:    tokens of KV that fit.
    """

    step: float
    per_token: float
    per_kv: float
    per_prefill: float
    per_pull: float
    kv_tokens: int

    def seconds(self, steps: float, tokens: float, kv: float, growth: float) -> float:
        """Of `steps` steps with `tokens` tokens each, over KV that begins with `kv` tokens and grows by `growth` after
        each: a sum of an arithmetic series."""
        return steps * (self.step + self.per_token * tokens + self.per_kv * kv) \
            + self.per_kv * growth * steps * (steps - 1) / 2


def cost_model(workload: Workload) -> CostModel:
    model, hardware, engine = workload.model, workload.hardware, workload.engine
    bandwidth = hardware.gpus * hardware.bandwidth * engine.bandwidth_share
    flops = hardware.gpus * hardware.flops * engine.flops_share
    weights = model.parameters * model.weight_bytes
    kv_bytes = model.kv_bytes_per_token * engine.kv_copies
    per_token = 2 * model.active_parameters / flops
    return CostModel(
        step=engine.overhead_s + weights / bandwidth,
        per_token=per_token,
        per_kv=kv_bytes / bandwidth,
        per_prefill=per_token,
        per_pull=model.kv_bytes_per_token / hardware.pool_bandwidth,
        kv_tokens=int((hardware.gpus * hardware.memory_bytes * engine.memory_share - weights) / kv_bytes))

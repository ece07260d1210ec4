"""What a run needs of each node, from its configuration."""

from __future__ import annotations

from math import prod

from launcher.preflight.findings import Expected
from megatron_pbsd.config import RunConfig

ADAM_BYTES = 8
"""Two float32 moments for each parameter."""


def expected_of(config: RunConfig) -> Expected:
    """GPUs, shared memory for weights on their way, disk for the checkpoints that are kept and the one that is being
    written. ModelError when the model cannot be read."""
    from megatron_pbsd.models import family
    from megatron_pbsd.models.shape import config_of

    hf = config_of(config.model)
    elements = sum(prod(shape) for shape in family(hf).hf_tensors(hf).values())
    precision = config.learner.precision
    if precision == "auto":
        precision = "bfloat16" if config.cluster.gpus_per_node else "float32"
    # A parameter, and beside a bfloat16 one its float32 copy.
    wire, kept = (4, 4) if precision == "float32" else (2, 6)
    two_buckets = 2 * config.rollout.transport.bucket_mb << 20
    moving = {"segment": elements * wire, "buckets": two_buckets, "disk": two_buckets}
    checkpoint = elements * (kept + ADAM_BYTES)
    least = Expected()
    return Expected(
        config.cluster.gpus_per_node, config.cluster.gpu,
        max(least.shm_bytes, moving.get(config.rollout.transport.kind, 0)),
        max(least.run_bytes, (config.checkpoint.keep + 1) * checkpoint))

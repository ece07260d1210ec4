"""Loss of a value head."""

from __future__ import annotations

import torch

from megatron_pbsd.config import ValueLossConfig
from megatron_pbsd.losses.inputs import LossInputs

FIELDS = ("values", "returns")
OUTPUTS = ("values",)
ERROR, RETURNS, SQUARED = "loss/value_error", "loss/returns", "loss/returns_squared"


def value_loss(inputs: LossInputs, config: ValueLossConfig) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Per token [N], and sums for metrics:

        1/2 max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2)

    PPO with value clipping, as in OpenAI's baselines (Engstrom et al., arXiv 2005.12729, section 3); without `clip`
    1/2 (V - R)^2. `inputs.values` is V, the fields are V_old and R.
    """
    old, returns = inputs["values"], inputs["returns"]
    plain = (inputs.values - returns) ** 2
    worst, clipped = plain, torch.zeros_like(plain)
    if config.clip is not None:
        moved = inputs.values - old
        bounded = (old + moved.clamp(-config.clip, config.clip) - returns) ** 2
        # Within the bounds the two differ by rounding only.
        worst, clipped = torch.maximum(plain, bounded), (bounded > plain) & (moved.abs() > config.clip)
    sums = {
        "loss/value": 0.5 * worst.sum(),
        "loss/value_clip_fraction": clipped.sum(),
        ERROR: plain.sum(),
        RETURNS: returns.sum(),
        SQUARED: (returns**2).sum(),
    }
    return 0.5 * worst, {name: value.detach() for name, value in sums.items()}


def with_explained_variance(metrics: dict[str, float]) -> dict[str, float]:
    """1 - E[(V - R)^2] / var(R): 1 is perfect, 0 is what the mean return would do."""
    metrics = dict(metrics)
    error, variance = metrics.pop(ERROR), metrics.pop(SQUARED) - metrics[RETURNS] ** 2
    return metrics | {"loss/value_explained_variance": 1 - error / variance if variance > 0 else 0.0}

"""What a loss is given and what it returns. Plain torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class LossInputs:
    """Per-token float32 tensors [N] of one micro-batch; padding is not among them.

    log_probs:          of each token under the policy being trained (nats), with gradient.
    entropy:            of the distribution it was drawn from (nats), with gradient.
    mask:               weight of the token, 0 or 1.
    advantages, old_log_probs, rollout_log_probs:  as in `batch.SCHEMA`; None where the loss does not ask for them.
    """

    log_probs: torch.Tensor
    entropy: torch.Tensor
    mask: torch.Tensor
    advantages: torch.Tensor | None = None
    old_log_probs: torch.Tensor | None = None
    rollout_log_probs: torch.Tensor | None = None


@dataclass(frozen=True)
class LossOutput:
    """loss: sum over tokens, with gradient. tokens: their number, int32 [].

    sums:    name → sum over tokens; reported as the mean per token of the global batch.
    maxima:  name → largest value; reported as the largest of the global batch.
    """

    loss: torch.Tensor
    tokens: torch.Tensor
    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    maxima: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Loss:
    """fields: columns of the batch that the function reads besides tokens and loss_mask."""

    name: str
    fields: tuple[str, ...]
    function: Callable[[LossInputs], LossOutput]

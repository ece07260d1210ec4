"""Losses on data of exactly the policy that is being trained: no pass for the old log-probs is needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from megatron_pbsd.losses.inputs import Loss, LossInputs, LossOutput


@dataclass(frozen=True)
class _OnPolicy:
    function: Callable[[LossInputs], LossOutput]

    def __call__(self, inputs: LossInputs) -> LossOutput:
        old = {"old_log_probs": inputs.log_probs.detach()}
        return self.function(replace(inputs, fields={**inputs.fields, **old}))


def without_old_log_probs(loss: Loss) -> Loss:
    """The same loss without the field `old_log_probs`: it is given log_probs without their gradient instead, so that
    the ratio to them is 1 and has the gradient of log_probs."""
    if "old_log_probs" not in loss.fields:
        return loss
    fields = tuple(name for name in loss.fields if name != "old_log_probs")
    return replace(loss, fields=fields, function=_OnPolicy(loss.function))

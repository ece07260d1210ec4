"""Any loss, on the fresh tokens alone: what older weights generated is context, and nothing is learnt from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from megatron_pbsd.losses.inputs import Loss, LossInputs, LossOutput

FIELD = "stale"
SHARE = "loss/stale_masked"


def without_stale(loss: Loss) -> Loss:
    """The same loss, in which tokens of the batch field `stale` have no term and pass no gradient on.

    They keep their place in the reduction, as tokens of weight 0 do everywhere (`losses.mismatch`): a fresh token
    counts exactly as much as if all were trained, wherever in its trajectory the weights changed. What a loss computes
    of whole sequences, such as GSPO's ratio or PBSD's multipliers, is still of all tokens, as a constant of the stale.
    """
    return replace(loss, fields=tuple(dict.fromkeys((*loss.fields, FIELD))), function=_Fresh(loss.function))


@dataclass(frozen=True)
class _Fresh:
    function: Callable[[LossInputs], LossOutput]

    def __call__(self, inputs: LossInputs) -> LossOutput:
        stale = inputs[FIELD] > 0

        def constant(values: torch.Tensor | None) -> torch.Tensor | None:
            if values is None:
                return None
            return torch.where(stale.view(-1, *[1] * (values.dim() - 1)), values.detach(), values)

        output = self.function(replace(
            inputs, weights=torch.where(stale, 0.0, inputs.weights), log_probs=constant(inputs.log_probs),
            entropy=constant(inputs.entropy), values=constant(inputs.values),
            candidate_log_probs=constant(inputs.candidate_log_probs)))
        return replace(output, sums=output.sums | {SHARE: stale.sum()})

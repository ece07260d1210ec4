"""PBSD's turn-level credit inside the loss: on exactly on-policy data no separate pass for the student is needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from megatron_pbsd.algorithms.evidence import Evidence
from megatron_pbsd.algorithms.pbsd import turn_multipliers
from megatron_pbsd.config import PBSDConfig
from megatron_pbsd.losses.errors import LossError
from megatron_pbsd.losses.inputs import Loss, LossInputs, LossOutput

FIELDS = ("advantages", "old_log_probs", "teacher_log_probs", "turn_index", "answer_mask")


def redistributed(loss: Loss, config: PBSDConfig) -> Loss:
    """`loss`, with each token's outcome advantage multiplied by what its turn has earned (docs/pbsd.md)."""
    return replace(
        loss, name=f"pbsd_{loss.name}", fields=tuple(dict.fromkeys(FIELDS + loss.fields)),
        function=_Redistributed(loss.function, config))


@dataclass(frozen=True)
class _Redistributed:
    function: Callable[[LossInputs], LossOutput]
    config: PBSDConfig

    def __call__(self, inputs: LossInputs) -> LossOutput:
        multipliers, sums = token_multipliers(inputs, self.config)
        advantages = inputs["advantages"] * multipliers
        output = self.function(replace(inputs, fields={**inputs.fields, "advantages": advantages}))
        return replace(output, sums=output.sums | sums)


def token_multipliers(inputs: LossInputs, config: PBSDConfig) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Each token's multiplier m_k of `algorithms.pbsd.turn_multipliers`, float32 [N], and sums for metrics.

    The student is `old_log_probs`, the teacher `teacher_log_probs`; `advantages` are one number per sequence. All that
    a sequence's tokens have to do with each other is in sums over its turns, which are added up over context-parallel
    ranks. LossError for a token that belongs to no turn.
    """
    turn = inputs["turn_index"]
    first, last = (int(turn.min()), int(turn.max())) if turn.numel() else (0, -1)
    if first < 0:
        raise LossError("PBSD needs the turn of every trained token, but turn_index is -1 for some of them")
    # Ranks must agree on a number of turns, and can only add: the sum of theirs is enough for all.
    turns = int(inputs.over_context(torch.tensor(last + 1.0, device=turn.device)))
    cell = inputs.sequence * turns + turn

    delta = inputs["teacher_log_probs"].double() - inputs["old_log_probs"]
    scored = 1 - inputs["answer_mask"].double() if config.exclude_answer_span else torch.ones_like(delta)
    terms = torch.stack([delta * scored, scored, torch.ones_like(delta), delta**2 * scored,
                         inputs["advantages"].double()], -1)
    sums = inputs.over_context(terms.new_zeros(inputs.sequences * turns, terms.shape[1]).index_add(0, cell, terms))
    evidence, tokens, generated, squares, advantages = (
        sums.view(inputs.sequences, turns, terms.shape[1]).cpu().numpy().transpose(2, 0, 1))
    found = turn_multipliers(Evidence(evidence, tokens, generated, squares.sum(-1)), advantages.sum(-1), config)

    values, passed, clipped = (
        torch.from_numpy(by_turn.ravel()).to(turn.device)[cell]
        for by_turn in (found.values, found.passed, found.clipped))
    return values.float(), {
        "loss/pbsd_evidence": (delta * scored).sum(),
        "loss/pbsd_snr_kept": passed.sum(),
        "loss/pbsd_clip_fraction": clipped.sum(),
        "loss/pbsd_multiplier_deviation": (values - 1).abs().sum(),
    }

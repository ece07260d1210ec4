"""What a loss is given and what it returns. Plain torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

from megatron_pbsd.losses.errors import LossError


@dataclass(frozen=True)
class Constant:
    """The reduction that divides the sum over tokens by the number of sequences times `tokens`."""

    tokens: int


Mean = Literal["token", "turn", "trajectory", "group"]
Reduction = Mean | Constant
Output = Literal["values", "candidates"]


@dataclass(frozen=True)
class LossInputs:
    """The tokens of one micro-batch that are trained on, float32 [N] per token unless said otherwise.

    Neither padding nor prompts nor observations are among them. Under context parallelism a rank has only some tokens
    of each sequence: use `over_sequence` for what depends on all of them.

    log_probs:   of each token under the policy being trained (nats), with gradient.
    entropy:     of the distribution it was drawn from (nats), with gradient.
    weights:     from the loss's reduction (`losses.reduction`); the loss is `sum(weights * per_token)`.
    sequence:    int64 [N], which of the micro-batch's sequences the token belongs to, 0 … sequences - 1.
    sequences:   sequences in the micro-batch.
    fields:      name → [N, …], the columns of the batch that the loss declares; fields of a turn or a trajectory
                 are repeated for each of its tokens.
    values:      the value head's estimate before the token, with gradient, if the loss asks for it.
    candidate_log_probs:  [N, K], of the tokens in `fields["teacher_top_tokens"]`, with gradient, if asked for.
    over_context:  sums a tensor over context-parallel ranks, in the forward and in the backward pass; every rank
                 must call it equally often, with equal shapes.
    """

    log_probs: torch.Tensor
    entropy: torch.Tensor
    weights: torch.Tensor
    sequence: torch.Tensor
    sequences: int
    fields: Mapping[str, torch.Tensor] = field(default_factory=dict)
    values: torch.Tensor | None = None
    candidate_log_probs: torch.Tensor | None = None
    over_context: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor

    def __getitem__(self, name: str) -> torch.Tensor:
        """A declared field. LossError for any other."""
        if name not in self.fields:
            raise LossError(f"the loss reads the field {name!r}, which it does not declare; it declares "
                            f"{', '.join(map(repr, self.fields)) or 'none'}")
        return self.fields[name]

    def over_sequence(self, per_token: torch.Tensor) -> torch.Tensor:
        """Sum of [N, …] over each whole sequence, [sequences, …]; differentiable."""
        sums = per_token.new_zeros(self.sequences, *per_token.shape[1:]).index_add(0, self.sequence, per_token)
        return self.over_context(sums)

    def sequence_mean(self, per_token: torch.Tensor) -> torch.Tensor:
        """Mean of [N] over each whole sequence, [sequences], 0 for one without tokens; differentiable."""
        total, count = self.over_sequence(torch.stack([per_token, torch.ones_like(per_token)], -1)).unbind(-1)
        return total / count.clamp(min=1)


@dataclass(frozen=True)
class LossOutput:
    """loss: sum of weighted token losses of this micro-batch, with gradient.

    sums:    name → sum over tokens; reported as the mean per token of the global batch.
    maxima:  name → largest non-negative value; reported as the largest of the global batch.
    """

    loss: torch.Tensor
    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    maxima: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Loss:
    """What the learner minimises. It can be pickled.

    fields:     columns of the batch that the function reads besides tokens and loss_mask.
    reduction:  over what token losses are averaged; see `losses.reduction`.
    outputs:    what the model must compute besides log-probabilities and entropy.
    summary:    from the global batch's means and maxima to the metrics to report: for what is no mean of tokens,
                such as an effective sample size.
    """

    name: str
    fields: tuple[str, ...]
    function: Callable[[LossInputs], LossOutput]
    reduction: Reduction = "token"
    outputs: tuple[Output, ...] = ()
    summary: Callable[[dict[str, float]], dict[str, float]] = dict

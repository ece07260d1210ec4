"""A loss of one's own: REINFORCE in which early turns count more.

    algorithm:
      name: grpo
      loss:
        name: custom
        file: docs/examples/early_turns_loss.py
        options: {discount: 0.9}

docs/losses.md describes what a loss is given and what it may declare.
"""

from megatron_pbsd.losses import LossInputs, LossOutput, register_loss


# `fields` are columns of the batch (megatron_pbsd/batch.py). Those declared here, and only those, are in `inputs`, one
# value per token. The reduction says what the learner averages over; its weights come in `inputs.weights`.
@register_loss("early_turns", fields=("advantages", "turn_index"), reduction="trajectory")
def early_turns(inputs: LossInputs, options: dict) -> LossOutput:
    """- discount^k A log pi for a token of turn k, counted from 0."""
    discount = options.get("discount", 1.0) ** inputs["turn_index"]

    # One number per token, with the gradient of `inputs.log_probs`. There may be no tokens at all: sums are safe then,
    # means are not. What depends on a whole sequence goes through `inputs.over_sequence` or `inputs.sequence_mean`,
    # because under context parallelism this rank has only some of its tokens.
    per_token = -discount * inputs["advantages"] * inputs.log_probs

    return LossOutput(
        loss=(per_token * inputs.weights).sum(),
        # Reported as means over the tokens of the global batch.
        sums={"loss/entropy": inputs.entropy.detach().sum(), "loss/discount": discount.sum()},
    )

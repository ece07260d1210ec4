"""Supervised fine-tuning: negative log-likelihood."""

from __future__ import annotations

from megatron_pbsd.losses.inputs import LossInputs, LossOutput


def sft_loss(inputs: LossInputs) -> LossOutput:
    """Weighted mean negative log-likelihood (nats per token)."""
    loss = -(inputs.log_probs * inputs.weights).sum()
    return LossOutput(loss, {"loss/total": loss.detach(), "loss/entropy": inputs.entropy.detach().sum()})

"""Supervised fine-tuning: negative log-likelihood."""

from __future__ import annotations

from megatron_pbsd.losses.inputs import LossInputs, LossOutput


def sft_loss(inputs: LossInputs) -> LossOutput:
    """-log pi per token (nats); mean over tokens unless configured otherwise."""
    loss = -(inputs.log_probs * inputs.weights).sum()
    return LossOutput(loss, {"loss/total": loss.detach(), "loss/entropy": inputs.entropy.detach().sum()})

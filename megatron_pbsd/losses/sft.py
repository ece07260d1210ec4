"""Supervised fine-tuning: negative log-likelihood."""

from __future__ import annotations

import torch

from megatron_pbsd.losses.inputs import LossInputs, LossOutput


def sft_loss(inputs: LossInputs) -> LossOutput:
    """Mean negative log-likelihood (nats per token) of the tokens in the mask."""
    loss = -(inputs.log_probs * inputs.mask).sum()
    return LossOutput(
        loss=loss,
        tokens=inputs.mask.sum().to(torch.int32),
        sums={"loss/total": loss.detach(), "loss/entropy": (inputs.entropy.detach() * inputs.mask).sum()})

"""Losses by name. All but `log_probs` are plain torch on per-token tensors."""

from __future__ import annotations

from functools import partial

from megatron_pbsd.config import PolicyLossConfig, SFTConfig
from megatron_pbsd.losses import policy, sft
from megatron_pbsd.losses.inputs import Loss, LossInputs, LossOutput
from megatron_pbsd.losses.reduction import token_weights

__all__ = ["Loss", "LossInputs", "LossOutput", "build", "token_weights"]


def build(config: PolicyLossConfig | SFTConfig) -> Loss:
    """The loss that a configuration asks for; it can be pickled."""
    if isinstance(config, PolicyLossConfig):
        return Loss("policy", policy.FIELDS, partial(policy.policy_loss, config=config))
    return Loss("sft", (), sft.sft_loss)

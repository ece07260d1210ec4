"""Losses by configuration. All but `log_probs` are plain torch on per-token tensors; docs/losses.md lists them."""

from __future__ import annotations

from functools import partial

from megatron_pbsd import config as sections
from megatron_pbsd.losses.custom import CustomLoss, register_loss
from megatron_pbsd.losses.distillation import jsd_loss, reverse_kl_loss
from megatron_pbsd.losses.errors import LossError
from megatron_pbsd.losses.inputs import Constant, Loss, LossInputs, LossOutput, Reduction
from megatron_pbsd.losses.on_policy import without_old_log_probs
from megatron_pbsd.losses.pbsd import redistributed
from megatron_pbsd.losses.policy import build_policy_loss
from megatron_pbsd.losses.reduction import token_weights
from megatron_pbsd.losses.sft import sft_loss
from megatron_pbsd.losses.stale import without_stale

__all__ = ["Constant", "Loss", "LossError", "LossInputs", "LossOutput", "Reduction", "build", "register_loss",
           "token_weights"]


def build(config: sections.Section, on_policy: bool = False, generation_limit: int | None = None,
          mask_stale: bool = False) -> Loss:
    """The loss that a configuration asks for; it can be pickled.

    config:            a loss section of `megatron_pbsd.config`, or the section of an algorithm. For most algorithms
                       that is the loss section in it; PBSD's redistributes the outcome advantages in `advantages` by
                       the batch's `teacher_log_probs` first. An algorithm that has done so itself passes `config.loss`.
    on_policy:         the data are of exactly the policy being trained: the loss does without `old_log_probs`.
    generation_limit:  most tokens that a trajectory may generate, the divisor of reduction 'constant'.
    mask_stale:        tokens of the batch field `stale` are context alone.

    LossError when the configuration needs what is missing: a user's file, or the generation limit.
    """
    loss = _build(config, generation_limit)
    if mask_stale:
        loss = without_stale(loss)
    return without_old_log_probs(loss) if on_policy else loss


def _build(config: sections.Section, generation_limit: int | None) -> Loss:
    match config:
        case sections.PBSDConfig():
            return redistributed(_build(config.loss, generation_limit), config)
        case sections.CustomLossConfig():
            custom = CustomLoss.load(config.file, config.function, config.options)
            asked = custom.registration
            return Loss(asked.name, asked.fields, custom, _reduction(asked.reduction, generation_limit), asked.outputs)
        case sections.Reduced():
            constant = config.reduction_constant or generation_limit
            return _section(config, _reduction(config.reduction, constant))
        case _:
            return _build(config.loss, generation_limit)


def _section(config: sections.Reduced, reduction: Reduction) -> Loss:
    match config:
        case sections.PolicyLossConfig():
            return build_policy_loss(config, reduction)
        case sections.SFTLossConfig():
            return Loss("sft", (), sft_loss, reduction)
        case sections.ReverseKLLossConfig():
            return Loss("reverse_kl", ("teacher_log_probs", "old_log_probs"), reverse_kl_loss, reduction)
        case sections.JSDLossConfig():
            return Loss("jsd", ("teacher_top_tokens", "teacher_top_log_probs"), partial(jsd_loss, config=config),
                        reduction, ("candidates",))
    raise TypeError(f"no loss for {type(config).__name__}")


def _reduction(name: Reduction | str, constant: int | None) -> Reduction:
    if name != "constant":
        return name
    if constant is None:
        raise LossError("loss.reduction = 'constant' needs loss.reduction_constant: the most tokens that a trajectory "
                        "may generate")
    return Constant(constant)

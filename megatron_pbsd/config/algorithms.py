"""Algorithms, each with the loss it is published with (docs/algorithms.md)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from megatron_pbsd.config.losses import (
    PolicyLoss,
    PolicyLossConfig,
    SFTLossConfig,
    SupervisedLoss,
    TeacherLoss,
    ValueLossConfig,
)
from megatron_pbsd.config.section import Fraction, PositiveInt, Section


class PolicyGradientConfig(Section):
    """What the algorithms that learn from rewards share."""

    name: str
    """Selects the algorithm."""
    sampling_attempts: PositiveInt = 1
    """Most rollouts in a step. Above 1, groups whose rewards are all equal, which teach nothing, are replaced by those
    of further prompts (dynamic sampling: DAPO, arXiv 2503.14476, section 3.2)."""
    loss: PolicyLoss = PolicyLossConfig()
    """The policy loss that the advantages weigh."""


class GRPOConfig(PolicyGradientConfig):
    """Group-relative policy optimisation (arXiv 2402.03300): reward minus the mean of its own group."""

    name: Literal["grpo"] = "grpo"
    """Selects this algorithm."""
    normalise_std: bool = True
    """Divide by the group's standard deviation."""


class DrGRPOConfig(PolicyGradientConfig):
    """GRPO without its biases towards length and difficulty (Dr. GRPO, arXiv 2503.20783): no standard deviation, and
    token losses are summed and divided by a constant."""

    name: Literal["dr_grpo"] = "dr_grpo"
    """Selects this algorithm."""
    loss: PolicyLoss = PolicyLossConfig(reduction="constant", clip_high=0.2)
    """The policy loss that the advantages weigh."""


class DAPOConfig(GRPOConfig):
    """GRPO with decoupled clipping, token mean, dynamic sampling and soft punishment of length (arXiv 2503.14476)."""

    name: Literal["dapo"] = "dapo"
    """Selects this algorithm."""
    sampling_attempts: PositiveInt = 4
    """Most rollouts in a step: groups whose rewards are all equal are replaced by those of further prompts."""
    overlong_tokens: PositiveInt | None = None
    """L_max: trajectories of this many generated tokens lose 1 of their reward; None punishes no length."""
    overlong_cache: PositiveInt = 32
    """L_cache: the punishment grows linearly over the last so many tokens before `overlong_tokens`."""

    @model_validator(mode="after")
    def _cache_fits(self) -> DAPOConfig:
        if self.overlong_tokens is not None and self.overlong_cache > self.overlong_tokens:
            raise ValueError(f"overlong_cache = {self.overlong_cache} exceeds overlong_tokens = "
                             f"{self.overlong_tokens}; it may be at most {self.overlong_tokens}")
        return self


class GSPOConfig(GRPOConfig):
    """GRPO's advantages under one importance ratio per trajectory (group sequence policy optimisation,
    arXiv 2507.18071)."""

    name: Literal["gspo"] = "gspo"
    """Selects this algorithm."""
    loss: PolicyLoss = PolicyLossConfig(ratio="sequence", clip_low=3e-4, clip_high=4e-4, reduction="trajectory")
    """The policy loss that the advantages weigh."""


class CISPOConfig(GRPOConfig):
    """GRPO's advantages under clipped importance weights that keep every token's gradient (MiniMax-M1,
    arXiv 2506.13585)."""

    name: Literal["cispo"] = "cispo"
    """Selects this algorithm."""
    loss: PolicyLoss = PolicyLossConfig(objective="cispo", clip_low=1.0, reduction="group")
    """The policy loss that the advantages weigh."""


class RLOOConfig(PolicyGradientConfig):
    """REINFORCE with the mean of the other trajectories of the group as baseline (arXiv 2402.14740)."""

    name: Literal["rloo"] = "rloo"
    """Selects this algorithm."""
    loss: PolicyLoss = PolicyLossConfig(objective="reinforce", reduction="constant")
    """The policy loss that the advantages weigh."""


class PenalisedConfig(PolicyGradientConfig):
    """What the algorithms share that can hold the policy to the model it started from."""

    kl_penalty: Annotated[float, Field(ge=0)] = 0.0
    """Weight of log pi_old - log pi_reference, taken from the reward of each token; the reference is the model in
    model.path, which is held by a further engine."""


class ReinforcePPConfig(PenalisedConfig):
    """REINFORCE with PPO's clipping and advantages normalised over the whole batch (REINFORCE++, arXiv 2501.03262)."""

    name: Literal["reinforce_pp"] = "reinforce_pp"
    """Selects this algorithm."""
    group_baseline: bool = False
    """Subtract the mean of the trajectory's group from its reward first (REINFORCE++-baseline)."""
    loss: PolicyLoss = PolicyLossConfig(clip_high=0.2)
    """The policy loss that the advantages weigh."""


class PPOConfig(PenalisedConfig):
    """Proximal policy optimisation (arXiv 1707.06347) with a value head and generalised advantage estimation
    (arXiv 1506.02438)."""

    name: Literal["ppo"] = "ppo"
    """Selects this algorithm."""
    gamma: Fraction = 1.0
    """Discount of the value of the next generated token."""
    gae_lambda: Fraction = 0.95
    """lambda: 0 trusts the value head, 1 the rewards."""
    whiten: bool = True
    """Normalise advantages to mean 0 and standard deviation 1 over the batch's tokens."""
    loss: PolicyLoss = PolicyLossConfig(clip_high=0.2, value=ValueLossConfig())
    """The policy loss that the advantages weigh."""

    @model_validator(mode="after")
    def _value_head_is_trained(self) -> PPOConfig:
        if isinstance(self.loss, PolicyLossConfig) and self.loss.value is None:
            raise ValueError("loss.value is null, but ppo needs a value head: give it, or another algorithm.name")
        return self


class PrivilegedConfig(PolicyGradientConfig):
    """What the algorithms with a privileged teacher share: the policy itself, told the verified answer."""

    exclude_answer_span: bool = True
    """Leave the final answer's text out of what the teacher says: it can copy it."""
    teacher_answer: Literal["verified", "shuffled", "neutral"] = "verified"
    """Controls: another prompt's answer, or neutral text of the same length."""
    teacher_top: PositiveInt = 32
    """K: how many of the teacher's likeliest tokens a loss compares with that reads them, such as `jsd`."""


class DistillConfig(PrivilegedConfig):
    """On-policy self-distillation: every generated token is moved towards the privileged teacher's opinion of it."""

    name: Literal["distill"] = "distill"
    """Selects this algorithm."""
    coefficient: Annotated[float, Field(ge=0)] = 1.0
    """c in A_t = outcome_weight A - c (log pi_student - log pi_teacher)."""
    outcome_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the group-relative outcome advantage A (GRPO's); 0 learns from the teacher alone."""
    normalise_std: bool = True
    """Divide the outcome advantage by the group's standard deviation."""
    loss: TeacherLoss = PolicyLossConfig()
    """`policy` weighs log-probs by A_t. `reverse_kl` and `jsd` compare every generated token with the teacher
    themselves, and read neither A_t nor any other key of this section but teacher_answer and teacher_top."""

    @model_validator(mode="after")
    def _outcome_is_read(self) -> DistillConfig:
        if self.outcome_weight and self.loss.name in ("reverse_kl", "jsd"):
            raise ValueError(f"outcome_weight = {self.outcome_weight:g} has no effect with loss.name = "
                             f"{self.loss.name!r}; set it to 0, or loss.name to 'policy'")
        return self


class PBSDConfig(PrivilegedConfig):
    """Privileged Bayesian self-distillation: GRPO's outcome advantage redistributed over turns (docs/pbsd.md)."""

    name: Literal["pbsd"] = "pbsd"
    """Selects this algorithm."""
    normalise_std: bool = True
    """Divide the outcome advantage by the group's standard deviation."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """T in m_k = clip(exp(sign(A) c_k / T), 1 - epsilon, 1 + epsilon)."""
    epsilon: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """How far a turn's multiplier m_k may be from 1."""
    snr_gate: Annotated[float, Field(ge=0)] = 1.0
    """g: a turn keeps m_k = 1 unless |c_k| > g * std_tokens(delta) / sqrt(n_k). 0 switches the gate off."""
    normalise_length: bool = True
    """Use the mean evidence per token of a turn instead of its sum."""


class SFTConfig(Section):
    """Supervised fine-tuning on scripted demonstrations: makes the base policy."""

    name: Literal["sft"] = "sft"
    """Selects this algorithm."""
    sequences_per_step: PositiveInt = 64
    """Demonstrations per optimizer step."""
    loss: SupervisedLoss = SFTLossConfig()
    """What is minimised."""
    privileged_fraction: Fraction = 0.5
    """Share of demonstrations in the privileged prompt format."""
    good_habits: Fraction = 0.2
    """Share of flawless demonstrations in the plain format."""
    bad_habits: dict[Literal["needless", "premature", "wrong_relation", "gives_up"], Annotated[float, Field(ge=0)]] = {
        "needless": 1.0, "premature": 6.0, "wrong_relation": 1.0, "gives_up": 6.0}
    """Relative weights of the habits in the other demonstrations (search_qa/demonstrations.py)."""
    good_habits_privileged: Fraction = 0.8
    """The same in the privileged format: how a small model learns what the hint is for."""
    fictional_names: Fraction = 0.5
    """Share of demonstrations whose entities are replaced by made-up names, so that they can only be copied."""


AlgorithmConfig = Annotated[
    GRPOConfig | DrGRPOConfig | DAPOConfig | GSPOConfig | CISPOConfig | RLOOConfig | ReinforcePPConfig | PPOConfig
    | DistillConfig | PBSDConfig | SFTConfig, Field(discriminator="name")]

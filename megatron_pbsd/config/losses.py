"""Losses, and the corrections for what the rollout engine computes differently (docs/losses.md)."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from megatron_pbsd.config.section import Fraction, Positive, PositiveInt, Section


class NoMismatchConfig(Section):
    """Every token counts once: learner and rollout engine are taken to agree."""

    name: Literal["none"] = "none"
    """Selects this correction."""


class TokenTISConfig(Section):
    """Token-level truncated importance sampling: min(pi_old / pi_rollout, cap)."""

    name: Literal["token_tis"] = "token_tis"
    """Selects this correction."""
    cap: Positive = 2.0
    """C, the largest weight of a token."""


class SequenceTISConfig(Section):
    """Sequence-level truncated importance sampling: the same with the ratio of whole sequences."""

    name: Literal["sequence_tis"] = "sequence_tis"
    """Selects this correction."""
    cap: Positive = 2.0
    """C, the largest weight of a sequence."""


class Band(Section):
    """low <= ratio <= high passes."""

    low: Annotated[float, Field(ge=0)]
    """Smallest ratio that passes."""
    high: Positive
    """Largest ratio that passes."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"low = {self.low:g} must be less than high = {self.high:g}: nothing would pass")
        return self


class SequenceMISConfig(Band):
    """Sequence-level masked importance sampling: the ratio of whole sequences as weight, 0 outside the band."""

    name: Literal["sequence_mis"] = "sequence_mis"
    """Selects this correction."""
    low: Annotated[float, Field(ge=0)] = 0.0
    """Smallest sequence ratio that passes."""
    high: Positive = 2.0
    """Largest sequence ratio that passes."""


class IcePopConfig(Band):
    """IcePop: the ratio of each token as weight, 0 outside the band."""

    name: Literal["icepop"] = "icepop"
    """Selects this correction."""
    low: Annotated[float, Field(ge=0)] = 0.5
    """alpha, the smallest token ratio that passes."""
    high: Positive = 5.0
    """beta, the largest token ratio that passes."""


class GeometricRejectionConfig(Band):
    """Sequences whose geometric mean ratio is outside the band are left out; the others count once."""

    name: Literal["geometric_rejection"] = "geometric_rejection"
    """Selects this correction."""
    low: Annotated[float, Field(ge=0)] = 0.999
    """Smallest geometric mean ratio that passes."""
    high: Positive = 1.001
    """Largest geometric mean ratio that passes."""


MismatchConfig = Annotated[
    NoMismatchConfig | TokenTISConfig | SequenceTISConfig | SequenceMISConfig | IcePopConfig | GeometricRejectionConfig,
    Field(discriminator="name")]


class ValueLossConfig(Section):
    """Clipped squared error of the value head (PPO)."""

    coefficient: Positive = 0.5
    """Weight of the value loss beside the policy loss."""
    clip: Positive | None = 0.2
    """The value may move this far from what it was at the start of the step; null does not clip."""


class Reduced(Section):
    """A loss that can be averaged in any way."""

    reduction: Literal["token", "turn", "trajectory", "group", "constant"] = "token"
    """Over what token losses are averaged: all tokens alike; turns, trajectories or prompt groups alike, each by the
    mean of its tokens; or `constant`, their sum over sequences * reduction_constant."""
    reduction_constant: PositiveInt | None = None
    """Divisor of `reduction: constant`; null is the most tokens that a trajectory may generate."""

    @model_validator(mode="after")
    def _constant_is_used(self) -> Self:
        if self.reduction_constant is not None and self.reduction != "constant":
            raise ValueError(f"reduction_constant = {self.reduction_constant} has no effect with reduction = "
                             f"{self.reduction!r}; set reduction to 'constant', or reduction_constant to null")
        return self


class PolicyLossConfig(Reduced):
    """Policy-gradient loss: PPO, DAPO, GSPO, CISPO, REINFORCE (docs/losses.md)."""

    name: Literal["policy"] = "policy"
    """Selects this loss."""
    objective: Literal["clip", "cispo", "reinforce"] = "clip"
    """`clip`: min(r A, clip(r) A). `cispo`: clip(r) A log pi with the gradient of log pi alone. `reinforce`:
    A log pi, whatever the ratio."""
    ratio: Literal["token", "sequence", "sequence_token"] = "token"
    """r: of each token; the geometric mean over its sequence (GSPO); or the latter with the gradient of the token
    alone (GSPO-token), for advantages that differ within a sequence."""
    clip_low: Fraction = 0.2
    """The ratio is clipped below at 1 - clip_low. With ratios of sequences the default is 3e-4."""
    clip_high: Annotated[float, Field(ge=0)] = 0.28
    """The ratio is clipped above at 1 + clip_high. With ratios of sequences the default is 4e-4."""
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """c: where A < 0 the clipped objective is at least c A, however large the ratio; null does not bound it."""
    kl_coefficient: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the estimate of KL(policy || kl_reference)."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimator whose gradient is followed: nothing on average for k1, that of KL(policy || reference) for k2, that of
    KL(reference || policy) for k3."""
    kl_reference: Literal["old", "reference"] = "old"
    """The policy at the start of the step, or that of the batch field `reference_log_probs`."""
    entropy_coefficient: float = 0.0
    """Weight of the entropy bonus."""
    mismatch: MismatchConfig = TokenTISConfig()
    """Correction for what the rollout engine computes differently from the learner."""
    value: ValueLossConfig | None = None
    """Train the value head as well; null for algorithms without one."""

    @model_validator(mode="before")
    @classmethod
    def _narrow_clip_of_sequences(cls, section: Any) -> Any:
        """The ranges of GSPO (arXiv 2507.18071, section 5.1): a geometric mean stays much closer to 1."""
        if isinstance(section, dict) and section.get("ratio") in ("sequence", "sequence_token"):
            return {"clip_low": 3e-4, "clip_high": 4e-4, **section}
        return section

    @model_validator(mode="after")
    def _dual_clip_is_used(self) -> Self:
        if self.dual_clip is not None and self.objective != "clip":
            raise ValueError(f"dual_clip = {self.dual_clip:g} has no effect with objective = {self.objective!r}; "
                             "set objective to 'clip', or dual_clip to null")
        return self


class SFTLossConfig(Reduced):
    """Negative log-likelihood."""

    name: Literal["sft"] = "sft"
    """Selects this loss."""


class ReverseKLLossConfig(Reduced):
    """KL(student || teacher) on the tokens that the student sampled."""

    name: Literal["reverse_kl"] = "reverse_kl"
    """Selects this loss."""


class JSDLossConfig(Reduced):
    """Generalised Jensen-Shannon divergence on the teacher's likeliest tokens and the rest as one (GKD)."""

    name: Literal["jsd"] = "jsd"
    """Selects this loss."""
    beta: Fraction = 0.5
    """0 is KL(teacher || student), 1 is KL(student || teacher)."""


class CustomLossConfig(Section):
    """A loss of one's own: a function that a Python file registers (docs/losses.md)."""

    name: Literal["custom"] = "custom"
    """Selects this loss."""
    file: str
    """Python file with a function decorated by `megatron_pbsd.losses.register_loss`; every learner rank reads it."""
    function: str | None = None
    """The name it is registered by; null if the file registers one loss."""
    options: dict[str, bool | int | float | str] = {}
    """Passed to the function as they are."""


PolicyLoss = Annotated[PolicyLossConfig | CustomLossConfig, Field(discriminator="name")]
TeacherLoss = Annotated[PolicyLossConfig | ReverseKLLossConfig | JSDLossConfig | CustomLossConfig,
                        Field(discriminator="name")]
SupervisedLoss = Annotated[SFTLossConfig | CustomLossConfig, Field(discriminator="name")]

"""The whole run as one typed tree. YAML in, `--a.b value` overrides on top, every error at once.

A component is handed the part it needs, never the tree. Durations are seconds, sizes bytes unless a name says
otherwise. `launcher/overrides.py` turns files and command lines into a `RunConfig`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

PositiveInt = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0.0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _over_defaults(cls, given: Any) -> Any:
        """A section of which some keys are given has others from the default of the field it stands in: an algorithm
        may have other defaults for its loss than the loss itself."""
        defaults = {name: field.default for name, field in cls.model_fields.items()}
        return _completed(given, defaults) if isinstance(given, dict) else given


def _completed(given: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """`given`, whose sections also have what their defaults were made with. Of a union, whose variants have a `name`,
    that is for the default's variant, which is also the one that is meant if there is no name."""
    completed = dict(given)
    for key, section in given.items():
        default = defaults.get(key)
        if not isinstance(section, dict) or not isinstance(default, Section):
            continue
        tag = {"name": default.name} if "name" in type(default).model_fields else {}
        if section.get("name", tag.get("name")) == tag.get("name"):
            chosen = tag | {name: getattr(default, name) for name in default.model_fields_set}
            completed[key] = {**chosen, **_completed(section, chosen)}
    return completed


class ModelConfig(Section):
    path: str
    """Folder in Hugging Face format: config.json, model.safetensors, tokenizer.json."""
    initial_weights: Literal["load", "random"] = "load"
    """`random` starts from the config alone, by the run's seed (base-policy training)."""


class ParallelConfig(Section):
    """Layout of the learner. Attention and dense layers: world_size = tp * pp * cp * dp, of which dp is derived.
    Experts divide the same ranks as etp * ep * pp * expert dp."""

    world_size: PositiveInt = 2
    """Number of learner ranks."""
    tp: PositiveInt = 2
    """Tensor-parallel size."""
    pp: PositiveInt = 1
    """Pipeline-parallel size."""
    vpp: PositiveInt = 1
    """Virtual pipeline stages per rank (interleaved schedule); 1 is the plain 1F1B schedule."""
    cp: PositiveInt = 1
    """Context-parallel size: a sequence is divided over this many ranks."""
    dynamic_cp: bool = False
    """Divide only sequences longer than learner.micro_batch_tokens, each over the fewest data-parallel ranks that hold
    it: 2, 4, … dp of them."""
    ep: PositiveInt = 1
    """Expert-parallel size: experts are divided over this many ranks. Mixture-of-experts models only."""
    etp: PositiveInt = 1
    """Tensor-parallel size inside an expert."""
    sequence_parallel: bool | None = None
    """Divide activations between tensor-parallel layers as well; None: on GPUs, and wherever experts meet tp > 1."""

    @property
    def dp(self) -> int:
        return self.world_size // (self.tp * self.pp * self.cp)

    @property
    def expert_dp(self) -> int:
        return self.world_size // (self.etp * self.ep * self.pp)

    @model_validator(mode="after")
    def _divides(self) -> ParallelConfig:
        problems = []
        size = self.tp * self.pp * self.cp
        if self.world_size % size:
            valid = [n for n in range(1, self.world_size + 1) if self.world_size % n == 0]
            problems.append(
                f"world_size = {self.world_size} is not a multiple of tp * pp * cp = {self.tp} * {self.pp} * {self.cp} "
                f"= {size}; with {self.world_size} ranks tp * pp * cp may be one of {valid}")
        elif (self.world_size // self.pp) % (self.ep * self.etp):
            ranks = self.world_size // self.pp
            valid = [n for n in range(1, ranks + 1) if ranks % n == 0]
            problems.append(
                f"ep * etp = {self.ep} * {self.etp} = {self.ep * self.etp} does not divide the {ranks} ranks of a "
                f"pipeline stage (tp * cp * dp); it may be one of {valid}")
        if self.vpp > 1 and self.pp == 1:
            problems.append(f"vpp = {self.vpp} needs a pipeline: set pp to 2 or more, or vpp to 1")
        if self.sequence_parallel and self.tp == 1:
            problems.append("sequence_parallel = True needs tp of 2 or more")
        if self.dynamic_cp:
            problems += self._against_dynamic_cp()
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _against_dynamic_cp(self) -> list[str]:
        problems = [
            f"dynamic_cp = True needs {name} = 1, but it is {getattr(self, name)}: set it to 1, or dynamic_cp to False"
            for name in ("cp", "pp", "ep") if getattr(self, name) != 1]
        if not problems and (self.dp < 2 or self.dp & (self.dp - 1)):
            valid = [self.tp * 2**n for n in range(1, self.world_size.bit_length() + 1)]
            nearest = min(valid, key=lambda size: abs(size - self.world_size))
            problems.append(
                f"dynamic_cp = True needs dp = 2, 4, 8, …, but world_size / tp = {self.world_size} / {self.tp} is "
                f"{self.dp}; the nearest valid world_size is {nearest}")
        return problems


class OptimizerConfig(Section):
    """Adam (Kingma & Ba 2015) with decoupled weight decay, as Megatron-core builds it."""

    lr: Annotated[float, Field(gt=0)] = 3e-4
    """Peak learning rate."""
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    """Learning rate at the end of the decay."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps of linear warm-up from 0."""
    decay_style: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the learning rate from the end of the warm-up to the run's last step."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay."""
    beta1: Fraction = 0.9
    """Decay of the first moment."""
    beta2: Fraction = 0.95
    """Decay of the second moment."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the root of the second moment."""
    clip_grad: Annotated[float, Field(gt=0)] = 1.0
    """Largest global gradient norm."""


class MoEConfig(Section):
    """Mixture-of-experts training; without effect on dense models."""

    routing_replay: bool = False
    """Use the experts that the rollout engine chose in every pass of the learner (R3, arXiv 2510.11370), and the
    student's experts in the teacher pass."""
    aux_loss_coefficient: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the balancing loss over each micro-batch (Switch Transformer, arXiv 2101.03961, eq. 4)."""
    expert_bias_update_rate: Annotated[float, Field(ge=0)] = 0.0
    """Step of the auxiliary-loss-free balancing bias (DeepSeek-V3, arXiv 2412.19437, section 2.1.2); 0 freezes it."""


class LearnerConfig(Section):
    parallel: ParallelConfig = ParallelConfig()
    """Layout of the learner's ranks."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Adam and its learning rate."""
    moe: MoEConfig = MoEConfig()
    """Routing and balancing of experts."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of parameters and activations; optimizer state, master weights and gradients are float32 always. `auto` is
    bfloat16 on GPUs and float32 on a CPU."""
    distributed_optimizer: bool | None = None
    """Divide optimizer state over data-parallel ranks; None: on GPUs."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations recomputed in the backward pass: none, those of core attention, or whole layers."""
    batching: Literal["packed", "padded"] = "packed"
    """`packed` lays sequences end to end (THD); `padded` gives each a row of its own."""
    micro_batch_tokens: PositiveInt = 4096
    """Upper bound of token positions that one rank holds in one micro-batch; over context-parallel ranks a sequence
    may be cp times as long."""
    logits_tokens: PositiveInt = 1024
    """Positions whose logits exist at a time; the backward pass computes them again when a micro-batch has more."""
    updates_per_step: PositiveInt = 1
    """Optimizer steps per rollout batch: groups are dealt to this many mini-batches."""
    recompute_log_probs: Literal["auto", "always"] = "auto"
    """`auto` makes no pass for the old log-probs where the update's own forward pass has them: one optimizer step per
    rollout batch, and every token sampled by the present weights."""
    deadline_s: Annotated[float, Field(gt=0)] = 300.0
    """After this long without an answer a learner phase is declared hung."""

    @model_validator(mode="after")
    def _dynamic_cp_is_possible(self) -> LearnerConfig:
        problems = []
        if self.parallel.dynamic_cp and self.batching != "packed":
            problems.append(f"parallel.dynamic_cp = True needs batching = 'packed', which is {self.batching!r}")
        if self.parallel.dynamic_cp and self.moe.aux_loss_coefficient:
            problems.append(
                f"moe.aux_loss_coefficient = {self.moe.aux_loss_coefficient:g} needs parallel.dynamic_cp = False: "
                "Megatron-core takes this loss over a fixed group of ranks; set it to 0, or balance experts with "
                "moe.expert_bias_update_rate")
        if problems:
            raise ValueError("\n".join(problems))
        return self


class RolloutConfig(Section):
    engines: PositiveInt = 2
    """Number of embedded engines."""
    slots: PositiveInt = 64
    """Sequences that one engine decodes at a time."""
    prompts_per_step: PositiveInt = 16
    """Prompts, and so groups, per step."""
    group_size: Annotated[int, Field(ge=2)] = 8
    """Trajectories per prompt."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Sampling temperature of training rollouts."""
    max_turns: PositiveInt = 6
    """Most turns of a trajectory."""
    max_turn_tokens: PositiveInt = 32
    """Most tokens the policy may generate in one turn."""
    max_context: PositiveInt = 512
    """Most tokens of a trajectory, prompt included."""
    deadline_s: Annotated[float, Field(gt=0)] = 300.0
    """After this long without a finished chunk an engine is declared hung."""
    probe_tolerance: Annotated[float, Field(gt=0)] = 1e-4
    """Largest |engine - learner| log-prob on the probe batch after a publication (nats)."""


class EnvironmentConfig(Section):
    name: Literal["search_qa"] = "search_qa"
    """Which environment."""
    retriever: Literal["bm25", "none"] = "bm25"
    """`none` returns nothing for any query: the control that shows answers come from the tool."""
    search_budget: PositiveInt = 4
    """Search calls per trajectory; further calls get an observation that says so."""
    observation_words: PositiveInt = 28
    """Passages are cut to this many words."""
    train_split: str = "train"
    """Split that training prompts are drawn from."""
    hops: tuple[Annotated[int, Field(ge=1, le=3)], ...] = (1, 2, 3)
    """Questions of these numbers of hops are asked."""


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


class EvaluationConfig(Section):
    every: Annotated[int, Field(ge=0)] = 10
    """Steps between evaluations; 0 evaluates only the first and the last policy."""
    split: str = "heldout"
    """Split that evaluation prompts come from."""
    prompts: PositiveInt = 200
    """Prompts per evaluation, one trajectory each."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """Sampling temperature; 0 is greedy."""
    at_start: bool = True
    """Evaluate the policy before the first step too."""


class CheckpointConfig(Section):
    every: Annotated[int, Field(ge=0)] = 20
    """Steps between checkpoints; 0 keeps only the last."""
    keep: PositiveInt = 2
    """Newest checkpoints that are kept."""
    export_hf: bool = True
    """Write the final policy in Hugging Face format too."""


class ObservabilityConfig(Section):
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    """Also send metrics to Weights & Biases; needs the extra `wandb`."""
    progress: bool = True
    """Show progress: a live display on a terminal, one line per step elsewhere."""
    trajectories_kept: Annotated[int, Field(ge=0)] = 0
    """Trajectory files of the last n steps are kept; 0 keeps all."""


class RunConfig(Section):
    """A run. Its folder is `<runs>/<name>`."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """The run's name: letters, digits, dots, dashes and underscores."""
    runs: str = "runs"
    """Folder that holds the folders of runs."""
    seed: Annotated[int, Field(ge=0)] = 1
    """Seed of everything random."""
    steps: PositiveInt
    """Steps of the whole run, resumed parts included."""
    runtime: Literal["ray", "inline"] = "ray"
    """`inline` runs every component in one process, for debugging; needs one learner rank."""
    ray_port: Annotated[int, Field(ge=1024, le=65535)] | None = None
    """Port of the local Ray head; None takes a free one."""
    model: ModelConfig
    """The policy."""
    algorithm: AlgorithmConfig = PBSDConfig()
    """From rewards to what is learnt; `algorithm.name` selects it."""
    learner: LearnerConfig = LearnerConfig()
    """Training: layout, optimizer, batching."""
    rollout: RolloutConfig = RolloutConfig()
    """Generation: engines, groups, limits."""
    environment: EnvironmentConfig = EnvironmentConfig()
    """Tasks and tools."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """When and on what the policy is measured."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When the run's state is saved."""
    observability: ObservabilityConfig = ObservabilityConfig()
    """What is recorded and shown."""

    @property
    def folder(self) -> Path:
        return Path(self.runs) / self.name

    def conflicts(self) -> list[str]:
        """Problems between sections that are valid by themselves, one message each."""
        problems = []
        if self.runtime == "inline" and self.learner.parallel.world_size != 1:
            problems.append(
                f"learner.parallel.world_size = {self.learner.parallel.world_size} needs runtime = 'ray'; "
                "runtime = 'inline' holds one rank: set learner.parallel.world_size, tp and pp to 1")
        if self.learner.updates_per_step > self.rollout.prompts_per_step:
            problems.append(
                f"learner.updates_per_step = {self.learner.updates_per_step} exceeds rollout.prompts_per_step = "
                f"{self.rollout.prompts_per_step}: a mini-batch needs at least one group")
        if self.model is not None and self.model.initial_weights == "random":
            reason = ("compares the policy with the model in model.path, from which model.initial_weights = 'random' "
                      "does not start it: set that to 'load', or this to")
            algorithm = self.algorithm
            if isinstance(algorithm, PenalisedConfig) and algorithm.kl_penalty:
                problems.append(f"algorithm.kl_penalty = {algorithm.kl_penalty:g} {reason} 0")
            if isinstance(algorithm.loss, PolicyLossConfig) and algorithm.loss.kl_reference == "reference":
                problems.append(f"algorithm.loss.kl_reference = 'reference' {reason} 'old'")
        return problems

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        if problems := self.conflicts():
            raise ValueError("\n".join(problems))
        return self

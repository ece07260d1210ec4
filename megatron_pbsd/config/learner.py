"""Training: layout of the ranks, optimizer, mixture of experts, batching."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from megatron_pbsd.config.section import Fraction, PositiveInt, Section


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
        """Data-parallel size."""
        return self.world_size // (self.tp * self.pp * self.cp)

    @property
    def expert_dp(self) -> int:
        """Ranks that hold the same part of the same experts."""
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
    """Mixture-of-experts training; its keys are refused for dense models."""

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
    release_memory: bool = False
    """Give the learner's device memory (parameters, gradients, optimizer state, NCCL buffers) to the engines during
    rollouts; values wait in host memory."""

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

"""The run: all sections together, and what they demand of each other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from megatron_pbsd.config.algorithms import AlgorithmConfig, PBSDConfig, PenalisedConfig
from megatron_pbsd.config.cluster import ClusterConfig, seconds_of
from megatron_pbsd.config.learner import LearnerConfig
from megatron_pbsd.config.losses import PolicyLossConfig
from megatron_pbsd.config.model import ModelConfig
from megatron_pbsd.config.rollout import EnvironmentConfig, EvaluationConfig, RolloutConfig
from megatron_pbsd.config.section import PositiveInt, Section


class BestConfig(Section):
    metric: str
    """A metric of the step, as in metrics.jsonl, e.g. `eval/exact_match`."""
    direction: Literal["max", "min"] = "max"
    """Whether more of it is better, or less."""


class CheckpointConfig(Section):
    every: Annotated[int, Field(ge=0)] = 20
    """Steps between checkpoints; 0 keeps only the last."""
    keep: PositiveInt = 2
    """Newest checkpoints that are kept."""
    keep_every: Annotated[int, Field(ge=0)] = 0
    """Checkpoints of steps that this divides are kept too; 0 keeps none for that."""
    best: BestConfig | None = None
    """The checkpoint with the best value of a metric is kept too."""
    export_hf: Literal["final", "every", "never"] = "final"
    """Which policies are written in Hugging Face format too: the last one, that of every checkpoint, or none."""


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
    cluster: ClusterConfig = ClusterConfig()
    """Where it runs."""

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
        learner = self.learner
        ranks = "dp" if learner.parallel.dynamic_cp else "cp"
        size = getattr(learner.parallel, ranks)
        positions = learner.micro_batch_tokens * size
        if self.algorithm.name != "sft" and self.rollout.max_context - 1 > positions:
            problems.append(
                f"rollout.max_context = {self.rollout.max_context} does not fit a micro-batch: "
                f"learner.micro_batch_tokens * learner.parallel.{ranks} = {learner.micro_batch_tokens} * {size} = "
                f"{positions} positions; raise either, or lower max_context to at most {positions + 1}")
        problems += self.rollout.conflicts()
        problems += self._transport_conflicts()
        problems += self._partial_conflicts()
        problems += self._checkpoint_conflicts()
        problems += self._cluster_conflicts()
        problems += self._device_conflicts()
        if self.model is not None and self.model.initial_weights == "random":
            reason = ("compares the policy with the model in model.path, from which model.initial_weights = 'random' "
                      "does not start it: set that to 'load', or this to")
            algorithm = self.algorithm
            if isinstance(algorithm, PenalisedConfig) and algorithm.kl_penalty:
                problems.append(f"algorithm.kl_penalty = {algorithm.kl_penalty:g} {reason} 0")
            if isinstance(algorithm.loss, PolicyLossConfig) and algorithm.loss.kl_reference == "reference":
                problems.append(f"algorithm.loss.kl_reference = 'reference' {reason} 'old'")
        return problems

    def _transport_conflicts(self) -> list[str]:
        rollout, kind, problems = self.rollout, self.rollout.transport.kind, []
        if kind == "collective" and self.runtime == "inline":
            problems.append(
                "rollout.transport.kind = 'collective' is between processes, and runtime = 'inline' has one: set the "
                "kind to one of segment, buckets, disk, or runtime to 'ray'")
        if kind in ("buckets", "ipc", "collective") and self.learner.release_memory and rollout.engine_restarts:
            problems.append(
                f"rollout.transport.kind = {kind!r} keeps no copy of the weights: with learner.release_memory = true "
                f"none of the rollout.engine_restarts = {rollout.engine_restarts} engines could be given any during a "
                "rollout; set the kind to 'segment' or 'disk', or engine_restarts to 0")
        return problems

    def _partial_conflicts(self) -> list[str]:
        rollout, algorithm = self.rollout, self.algorithm
        if rollout.over_sampling == 1:
            return []
        asked = f"rollout.over_sampling = {rollout.over_sampling:g}"
        if algorithm.name == "sft":
            return [f"{asked} has no effect with algorithm.name = 'sft', which trains on demonstrations; set it to 1"]
        problems = []
        if algorithm.sampling_attempts > 1:
            problems.append(
                f"{asked} and algorithm.sampling_attempts = {algorithm.sampling_attempts} both ask for more prompts "
                "than a step trains on, and cannot be combined: set sampling_attempts to 1, or over_sampling to 1")
        loss = algorithm.loss
        corrected = loss.mismatch.name != "none" if isinstance(loss, PolicyLossConfig) else loss.name != "reverse_kl"
        if rollout.max_staleness and rollout.stale_tokens == "correct" and not corrected:
            lacking = ("algorithm.loss.mismatch.name = 'none'" if isinstance(loss, PolicyLossConfig)
                       else f"algorithm.loss.name = {loss.name!r}")
            problems.append(
                f"rollout.stale_tokens = 'correct' corrects nothing with {lacking}: set stale_tokens to 'mask', or the "
                "loss to 'policy' with a mismatch correction such as 'token_tis'")
        return problems

    def _checkpoint_conflicts(self) -> list[str]:
        checkpoint, evaluated = self.checkpoint, self.evaluation.every
        problems = []
        if checkpoint.keep_every and (not checkpoint.every or checkpoint.keep_every % checkpoint.every):
            problems.append(
                f"checkpoint.keep_every = {checkpoint.keep_every} names steps at which checkpoint.every = "
                f"{checkpoint.every} makes no checkpoint; " + (
                    f"the nearest multiple is {_nearest_multiple(checkpoint.keep_every, checkpoint.every)}"
                    if checkpoint.every else "set checkpoint.every to it"))
        by_evaluation = checkpoint.best is not None and checkpoint.best.metric.startswith("eval/")
        if by_evaluation and checkpoint.every and (not evaluated or checkpoint.every % evaluated):
            problems.append(
                f"checkpoint.best.metric = {checkpoint.best.metric!r} is not known of every checkpoint: "
                f"checkpoint.every = {checkpoint.every}, evaluation.every = {evaluated}; " + (
                    f"the nearest checkpoint.every is {_nearest_multiple(checkpoint.every, evaluated)}"
                    if evaluated else f"set evaluation.every to {checkpoint.every}"))
        return problems

    def _cluster_conflicts(self) -> list[str]:
        cluster, problems = self.cluster, []
        least = cluster.min_nodes
        if least is not None and least > cluster.nodes:
            problems.append(f"cluster.min_nodes = {least} exceeds cluster.nodes = {cluster.nodes}; it may be at most "
                            f"{cluster.nodes}")
        if self.runtime == "inline" and cluster.nodes > 1:
            problems.append(f"cluster.nodes = {cluster.nodes} needs runtime = 'ray'; runtime = 'inline' is one process "
                            "on one node: set cluster.nodes to 1")
        limit, before = cluster.slurm.time_limit, cluster.slurm.stop_before_s
        if limit and seconds_of(limit) <= before:
            problems.append(
                f"cluster.slurm.stop_before_s = {before} leaves nothing of cluster.slurm.time_limit = {limit!r} "
                f"({seconds_of(limit)} s); it may be at most {seconds_of(limit) - 1}")
        return problems

    def _device_conflicts(self) -> list[str]:
        """More GPUs than there are."""
        cluster, rollout, ranks = self.cluster, self.rollout, self.learner.parallel.world_size
        devices = cluster.nodes * cluster.gpus_per_node
        if not devices:
            return []
        there = f"cluster.nodes * cluster.gpus_per_node = {cluster.nodes} * {cluster.gpus_per_node} = {devices}"
        if ranks > devices:
            return [f"learner.parallel.world_size = {ranks} exceeds {there}; it may be at most {devices}"]
        sizes = [rollout.sglang.args.get(f"{key}_size", 1) for key in ("tp", "pp")]
        if rollout.engine != "sglang" or not all(isinstance(size, int) for size in sizes):
            return []
        size, shared = sizes[0] * sizes[1], self.learner.release_memory
        if problems := self._machine_conflicts(size):
            return problems
        room, needed = devices if shared else devices - ranks, rollout.engines * size
        if needed > room:
            beside = "" if shared else " besides the learner's, which learner.release_memory = true lets them share"
            nearest = (f"the nearest valid value is {room // size}" if room >= size
                       else "ask for more nodes, or smaller servers")
            return [f"rollout.engines = {rollout.engines} with tp_size * pp_size = {size} need {needed} GPUs, but of "
                    f"{there} there are {room} for them{beside}; {nearest}"]
        return []

    def _machine_conflicts(self, size: int) -> list[str]:
        """How a server of so many GPUs is divided over machines. Without `nnodes` it is on as few as have room."""
        each, nodes = self.cluster.gpus_per_node, self.cluster.nodes
        machines = self.rollout.sglang.args.get("nnodes")
        if machines is None:
            if size <= each or size % each == 0:
                return []
            below = size // each * each
            return [f"rollout.sglang.args: tp_size * pp_size = {size} does not fill nodes of cluster.gpus_per_node = "
                    f"{each}; the nearest valid values are {below} and {below + each}"]
        if type(machines) is not int:
            return []  # which is named elsewhere
        if machines > nodes:
            return [f"rollout.sglang.args.nnodes = {machines} exceeds cluster.nodes = {nodes}; it may be at most "
                    f"{nodes}"]
        if size > machines * each:
            return [f"rollout.sglang.args.nnodes = {machines} leaves {size // machines} GPUs of a server to a node of "
                    f"cluster.gpus_per_node = {each}; the nearest valid value is {-(-size // each)}"]
        return []

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        if problems := self.conflicts():
            raise ValueError("\n".join(problems))
        return self


def _nearest_multiple(value: int, of: int) -> int:
    """At least `of` itself."""
    return max(1, round(value / of)) * of

"""From a configuration to the components that a loop is handed, started in order and stopped in reverse."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_pbsd import credit, losses, summary
from megatron_pbsd.checkpointing.hf_export import export_hf
from megatron_pbsd.checkpointing.store import CheckpointStore, read_manifest
from megatron_pbsd.config import RunConfig
from megatron_pbsd.controller.runtime import Handle, Runtime, open_runtime
from megatron_pbsd.environments import Environment, build_environment
from megatron_pbsd.learner.group import LearnerGroup
from megatron_pbsd.observability.recorder import Recorder
from megatron_pbsd.observability.records import TRAJECTORIES
from megatron_pbsd.prompts import evaluation_requests
from megatron_pbsd.resharding.publication import Publisher
from megatron_pbsd.rollout.coordinator import CollectStatistics, RolloutRequest, build_coordinator
from megatron_pbsd.rollout.engine_group import EngineGroup
from megatron_pbsd.rollout.engines.host import EngineHost
from megatron_pbsd.rollout.engines.protocol import Engine
from megatron_pbsd.trajectory import Group

if TYPE_CHECKING:
    from megatron_pbsd.learner.learner import Learner

PROBE_SEQUENCES = 4
POLL_S = 0.5


class Rollout:
    """The coordinator as the driver sees it: blocks until the groups are there, and shows progress meanwhile."""

    def __init__(self, runtime: Runtime, coordinator: Handle, config: RunConfig, recorder: Recorder):
        self._runtime, self._coordinator, self._config, self._recorder = runtime, coordinator, config, recorder

    def collect(self, requests: Sequence[RolloutRequest], step: int, *, temperature: float | None = None,
                kind: str = "step", attempt: int = 0) -> tuple[list[Group], CollectStatistics]:
        """Unscored groups in the order of `requests`, and what the engines did.

        Finished trajectories are in `trajectories/<kind>_<step>.unscored.jsonl` until a rollout begins that is not a
        further attempt of the same step.
        """
        if attempt == 0:
            self.discard_unscored()
        sink = self._recorder.folder / TRAJECTORIES / f"{kind}_{step:06d}.unscored.jsonl"
        call = self._coordinator.call(
            "collect", requests, step=step, seed=self._config.seed, sink=sink.resolve(),
            routed_experts=self._config.learner.moe.routing_replay and kind == "step",
            temperature=self._config.rollout.temperature if temperature is None else temperature)
        # The coordinator has a deadline for each engine call; here only its own death can be news.
        while not self._runtime.wait([call], timeout=POLL_S)[0]:
            progress = self._runtime.result(self._coordinator.observe("progress"))
            self._recorder.rollout_progress(progress.finished, progress.total)
        groups = self._runtime.result(call)
        return groups, self._runtime.result(self._coordinator.call("statistics"))

    def discard_unscored(self) -> None:
        """What the last rollout wrote has since been recorded with its scores."""
        for path in (self._recorder.folder / TRAJECTORIES).glob("*.unscored.jsonl"):
            path.unlink()


@dataclass
class Components:
    """reference: an engine that no weights are published to, if the algorithm compares with it.
    done: training steps that are behind the learner's weights (0 in a new run)."""

    config: RunConfig
    recorder: Recorder
    environment: Environment
    learner: LearnerGroup
    publisher: Publisher
    rollout: Rollout
    reference: EngineGroup | None
    checkpoints: CheckpointStore
    done: int

    def __post_init__(self) -> None:
        splits = {self.config.environment.train_split, self.config.evaluation.split}
        self._tasks = {task.task_id: task for split in splits for task in self.environment.tasks(split)}

    @contextmanager
    def engines_alone(self) -> Iterator[None]:
        """The learner gives its device memory away meanwhile, if the configuration says so."""
        if not self.config.learner.release_memory:
            yield
            return
        self.learner.release("the rollout")
        yield
        self.learner.regain()

    def reward(self, groups: Sequence[Group]) -> list[Group]:
        """Verify every trajectory's answer."""
        return score(self.environment, groups, self._tasks)

    def evaluate(self, step: int) -> dict[str, float]:
        """The policy in the engines on the evaluation split."""
        config = self.config
        with self.recorder.phase("evaluation"):
            requests = evaluation_requests(self.environment.tasks(config.evaluation.split), config)
            groups, _ = self.rollout.collect(
                requests, step, temperature=config.evaluation.temperature, kind="evaluation")
            return summary.of_evaluation(self.reward(groups))

    def save(self, step: int) -> None:
        """A checkpoint to resume from; with the last one, the policy in Hugging Face format."""
        # Parameters and two Adam moments; the estimate only has to catch a disk that cannot hold it.
        needed = 3 * int(self.publisher.nbytes)
        layout = self.config.learner.parallel.model_dump()
        with self.checkpoints.writing(step, layout, needed) as folder:
            self.learner.save(str(folder.resolve() / "learner"))
        if step == self.config.steps and self.config.checkpoint.export_hf:
            export_hf(self.publisher.published(), Path(self.config.model.path), self.recorder.folder / "exported")


def score(environment: Environment, groups: Sequence[Group], tasks: dict) -> list[Group]:
    """The groups with every trajectory's reward and outcome measures."""
    scored = []
    for group in groups:
        members = []
        for trajectory in group.trajectories:
            result = environment.score(tasks[trajectory.task_id], trajectory)
            members.append(trajectory.with_scores(result.reward, result.measures))
        scored.append(dataclasses.replace(group, trajectories=tuple(members)))
    return scored


@contextmanager
def build(config: RunConfig, resume: bool) -> Iterator[Components]:
    """All components of a run, whose records go to `<runs>/<name>`. `resume` continues from its newest checkpoint."""
    folder = config.folder
    checkpoints = CheckpointStore(folder / "checkpoints", config.checkpoint.keep)
    newest = checkpoints.newest() if resume else None
    done = read_manifest(newest).step if newest else 0
    with ExitStack() as stack:
        recorder = stack.enter_context(Recorder(folder, config.observability, config, done + 1 if done else 0))
        runtime = stack.enter_context(open_runtime(config.runtime, config.folder / "logs", config.ray_port))
        learner, engines = start_learner(runtime, config), start_engines(runtime, config)
        reference = start_reference(runtime, config)
        coordinator = start_coordinator(runtime, config, engines)
        environment = build_environment(config.environment, config.model.path)
        learner.ready()
        engines.ready()
        if reference is not None:
            reference.ready()
        if newest is not None:
            learner.load(str((newest / "learner").resolve()))
        publisher = Publisher(learner, engines, _probe(environment, config), config.rollout.probe_tolerance)
        stack.callback(publisher.close)
        rollout = Rollout(runtime, coordinator, config, recorder)
        yield Components(config, recorder, environment, learner, publisher, rollout, reference, checkpoints, done)
        rollout.discard_unscored()


def start_learner(runtime: Runtime, config: RunConfig) -> LearnerGroup:
    supervised = config.algorithm.name == "sft"
    loss = losses.build(config.algorithm) if supervised else credit.loss_of(config, on_policy=False)
    return LearnerGroup.spawn(
        runtime, build_learner, world_size=config.learner.parallel.world_size, deadline_s=config.learner.deadline_s,
        model=config.model, config=config.learner, loss=loss, seed=config.seed,
        total_steps=config.steps * (1 if supervised else config.learner.updates_per_step))


def build_learner(rank: int, rendezvous: str, **arguments: Any) -> Learner:
    """In the rank's own process: the driver never imports Megatron."""
    # Megatron warns of every GPU package that is absent; in a log's last lines that would hide what went wrong.
    warnings.filterwarnings("ignore", module=r"megatron\.core", category=UserWarning)
    from megatron_pbsd.learner.learner import Learner

    return Learner(rank, rendezvous, **arguments)


def start_engines(runtime: Runtime, config: RunConfig) -> EngineGroup:
    return EngineGroup.spawn(
        runtime, build_engine, count=config.rollout.engines, deadline_s=config.rollout.deadline_s,
        model_path=config.model.path, slots=config.rollout.slots, max_context=config.rollout.max_context,
        load_weights=config.model.initial_weights == "load")


def start_reference(runtime: Runtime, config: RunConfig) -> EngineGroup | None:
    """The model that the run started from, as an engine that is never given other weights."""
    if config.algorithm.name == "sft" or "reference" not in credit.plan_of(config, on_policy=False).passes:
        return None
    handle = runtime.spawn(
        "reference", EngineHost, build_engine, name="reference", model_path=config.model.path, slots=1,
        max_context=config.rollout.max_context)
    return EngineGroup(runtime, [handle], config.rollout.deadline_s)


def build_engine(**arguments: Any) -> Engine:
    """In the engine's own process: the driver never imports transformers."""
    from megatron_pbsd.rollout.engines.embedded.engine import EmbeddedEngine

    return EmbeddedEngine(**arguments)


def start_coordinator(runtime: Runtime, config: RunConfig, engines: EngineGroup) -> Handle:
    return runtime.spawn("coordinator", build_coordinator, engines.handles, config, runtime.client)


def _probe(environment: Environment, config: RunConfig) -> list[tuple[int, ...]]:
    """Prompts with their answers disclosed twice over: long enough to exercise attention, the same in every run."""
    tasks = environment.tasks(config.evaluation.split)[:PROBE_SEQUENCES]
    return [environment.prompt(task) + environment.privileged_prompt(task, task.answers[0]) for task in tasks]

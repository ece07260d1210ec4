"""From a configuration to the components that a loop is handed, started in order and stopped in reverse."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron_pbsd import losses, summary
from megatron_pbsd.checkpointing.hf_export import export_hf
from megatron_pbsd.checkpointing.store import CheckpointStore, read_manifest
from megatron_pbsd.config import RunConfig
from megatron_pbsd.controller import open_runtime
from megatron_pbsd.controller.groups import EngineGroup, LearnerGroup
from megatron_pbsd.controller.rendezvous import rendezvous_address
from megatron_pbsd.controller.runtime import Handle, Runtime, gather
from megatron_pbsd.environments import Environment, build_environment
from megatron_pbsd.observability.records import TRAJECTORIES
from megatron_pbsd.observability.recorder import Recorder
from megatron_pbsd.prompts import evaluation_requests
from megatron_pbsd.resharding.publication import Publisher
from megatron_pbsd.rollout.coordinator import Coordinator, EngineHost
from megatron_pbsd.rollout.episode import RolloutRequest
from megatron_pbsd.trajectory import Group

PROBE_SEQUENCES = 4
POLL_S = 0.5


class Rollout:
    """The coordinator as the driver sees it: blocks until the groups are there, and shows progress meanwhile."""

    def __init__(self, coordinator: Handle, config: RunConfig, recorder: Recorder):
        self._coordinator, self._config, self._recorder = coordinator, config, recorder

    def collect(self, requests: Sequence[RolloutRequest], step: int, *, prefix: str | None = None,
                temperature: float | None = None) -> tuple[list[Group], dict[str, float]]:
        """Unscored groups in the order of `requests`, and the rollout's metrics."""
        temperature = self._config.rollout.temperature if temperature is None else temperature
        sink = self._recorder.folder / TRAJECTORIES / f"{prefix or 'step'}_{step:06d}.unscored.jsonl"
        call = self._coordinator.call("collect", requests, prefix or str(step), self._config.seed, temperature, sink)
        # The coordinator has its own deadline per engine call; here only its own death can be news.
        while not self._coordinator.wait([call], POLL_S)[0]:
            self._recorder.rollout_progress(*self._coordinator.call("progress").result())
        return call.result()

    def discard_unscored(self) -> None:
        """What the sinks held has since been written with its scores."""
        for path in (self._recorder.folder / TRAJECTORIES).glob("*.unscored.jsonl"):
            path.unlink()


@dataclass
class Components:
    """done: training steps that are behind the learner's weights (0 in a new run)."""

    config: RunConfig
    recorder: Recorder
    environment: Environment
    learner: LearnerGroup
    publisher: Publisher
    rollout: Rollout
    checkpoints: CheckpointStore
    done: int

    def reward(self, groups: Sequence[Group]) -> list[Group]:
        """Verify every trajectory's answer."""
        return score(self.environment, groups, self._tasks)

    def __post_init__(self) -> None:
        splits = {self.config.environment.train_split, self.config.evaluation.split}
        self._tasks = {task.task_id: task for split in splits for task in self.environment.tasks(split)}

    def evaluate(self, step: int) -> dict[str, float]:
        """The policy in the engines on the evaluation split."""
        config = self.config
        with self.recorder.phase("evaluation"):
            requests = evaluation_requests(self.environment.tasks(config.evaluation.split), config)
            groups, _ = self.rollout.collect(
                requests, step, prefix="evaluation", temperature=config.evaluation.temperature)
            return summary.of_evaluation(self.reward(groups))

    def save(self, step: int) -> None:
        """A checkpoint to resume from; with the last one, the policy in Hugging Face format."""
        # Parameters and two Adam moments; the estimate only has to catch a disk that cannot hold it.
        needed = 3 * int(self.publisher.nbytes)
        layout = self.config.learner.parallel.model_dump()
        with self.checkpoints.writing(step, layout, needed) as folder:
            self.learner.save(str(folder / "learner"))
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
        runtime = open_runtime(config.runtime, folder / "logs")
        stack.callback(runtime.close)
        environment = build_environment(config.environment, config.model.path)
        learner = start_learner(runtime, config)
        engines = start_engines(runtime, config)
        coordinator = start_coordinator(runtime, config, engines)
        if newest is not None:
            learner.load(str(newest / "learner"))
        publisher = Publisher(learner, EngineGroup(engines, config.rollout.deadline_s),
                              _probe(environment, config), config.rollout.probe_tolerance)
        stack.callback(publisher.close)
        rollout = Rollout(coordinator, config, recorder)
        yield Components(config, recorder, environment, learner, publisher, rollout, checkpoints, done)
        rollout.discard_unscored()


def start_learner(runtime: Runtime, config: RunConfig) -> LearnerGroup:
    from megatron_pbsd.learner.learner import Learner

    algorithm = config.algorithm
    loss = losses.build(algorithm if algorithm.name == "sft" else algorithm.loss)
    updates = 1 if algorithm.name == "sft" else config.learner.updates_per_step
    address = rendezvous_address(config.learner.port)
    ranks = range(config.learner.parallel.world_size)
    handles = [
        runtime.spawn(f"learner-{rank}", Learner, rank, address, config.model, config.learner, loss, config.seed,
                      config.steps * updates)
        for rank in ranks
    ]
    return LearnerGroup(handles, config.learner.deadline_s, runtime)


def start_engines(runtime: Runtime, config: RunConfig) -> list[Handle]:
    from megatron_pbsd.rollout.engines.embedded.engine import EmbeddedEngine

    names = [f"engine-{i}" for i in range(config.rollout.engines)]
    return [
        runtime.spawn(name, EngineHost, partial(
            EmbeddedEngine, config.model.path, name=name, slots=config.rollout.slots,
            max_context=config.rollout.max_context, load_weights=config.model.initial_weights == "load"))
        for name in names
    ]


def start_coordinator(runtime: Runtime, config: RunConfig, engines: Sequence[Handle]) -> Handle:
    # Two threads: one collects, the other says how far it is.
    environment = partial(build_environment, config.environment, config.model.path)
    return runtime.spawn("coordinator", Coordinator, engines, environment, config.rollout, threads=2)


def _probe(environment: Environment, config: RunConfig) -> list[tuple[int, ...]]:
    """Prompts with their answers disclosed twice over: long enough to exercise attention, the same in every run."""
    tasks = environment.tasks(config.evaluation.split)[:PROBE_SEQUENCES]
    return [environment.prompt(task) + environment.privileged_prompt(task, task.answers[0]) for task in tasks]

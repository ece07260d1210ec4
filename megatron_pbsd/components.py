"""From a configuration to the components that a loop is handed, started in order and stopped in reverse."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from megatron_pbsd import credit, losses, summary
from megatron_pbsd.checkpointing.errors import CheckpointError
from megatron_pbsd.checkpointing.fsck import LEARNER
from megatron_pbsd.checkpointing.hf_export import export_checkpoint
from megatron_pbsd.checkpointing.manifest import Contents
from megatron_pbsd.checkpointing.retention import unknown
from megatron_pbsd.checkpointing.store import CheckpointStore, complete
from megatron_pbsd.checkpointing.torch_dist import writer_name
from megatron_pbsd.config import RunConfig
from megatron_pbsd.controller.failures import ComponentDied
from megatron_pbsd.controller.runtime import Handle, Runtime, open_runtime
from megatron_pbsd.environments import Environment, build_environment
from megatron_pbsd.errors import UsageError
from megatron_pbsd.learner.group import LearnerGroup
from megatron_pbsd.observability.recorder import Recorder
from megatron_pbsd.observability.records import TRAJECTORIES
from megatron_pbsd.prompts import Stream, evaluation_requests, position
from megatron_pbsd.resharding.publication import Publisher
from megatron_pbsd.resharding.shared_memory import SharedFolder
from megatron_pbsd.resume import Start, carried_file, find_start, leaving_weights
from megatron_pbsd.rollout.coordinator import CollectStatistics, build_coordinator
from megatron_pbsd.rollout.engine_group import EngineGroup
from megatron_pbsd.rollout.engines.embedded.kv_pool import PoolPlace
from megatron_pbsd.rollout.engines.host import EngineHost
from megatron_pbsd.rollout.engines.protocol import Engine
from megatron_pbsd.rollout.request import RolloutRequest, Started
from megatron_pbsd.rollout.sink import read_trajectories, taken_up
from megatron_pbsd.trajectory import Group, Trajectory

if TYPE_CHECKING:
    from megatron_pbsd.learner.learner import Learner

PROBE_SEQUENCES = 4
EXPORTED = "exported"
POLL_S = 0.5


class Rollout:
    """The coordinator as the driver sees it: blocks until the groups are there, and shows progress meanwhile.

    publisher: whose weights the engines have.
    """

    def __init__(self, runtime: Runtime, coordinator: Handle, config: RunConfig, recorder: Recorder,
                 publisher: Publisher, engines: EngineGroup):
        self._runtime, self._coordinator, self._config, self._recorder = runtime, coordinator, config, recorder
        self._publisher, self._engines = publisher, engines
        self._restarts = config.rollout.engine_restarts
        self._deaths = 0
        self._taken_up: list[Trajectory] = []
        self.stream = Stream()
        """Where the run is in its prompts if it goes on from the weights that the engines have."""

    def collect(self, requests: Sequence[RolloutRequest], step: int, *, temperature: float | None = None,
                kind: str = "step", attempt: int = 0, carried: Sequence[Started] = (),
                wanted: int | None = None) -> Collected:
        """Unscored groups in the order of `carried` and `requests`, and what the engines did. carried, wanted: see
        `Coordinator.collect`.

        Finished trajectories are in `trajectories/<kind>_<step>.unscored.jsonl` until a rollout begins that is not a
        further attempt of the same step. What a run that died had finished of this rollout, with the same weights, is
        not generated again.
        """
        sink = self._recorder.folder / TRAJECTORIES / f"{kind}_{step:06d}.unscored.jsonl"
        sampling = {
            "seed": self._config.seed,
            "routed_experts": self._config.learner.moe.routing_replay and kind == "step",
            "temperature": self._config.rollout.temperature if temperature is None else temperature}
        if attempt == 0:
            self.discard_unscored(but=sink.stem)
            self._taken_up = taken_up(sink, self._origin(sampling))
        arguments = {"step": step, "sink": sink.resolve(), "carried": carried, "wanted": wanted, **sampling}
        groups = self._collect(requests, finished=self._taken_up, **arguments)
        while groups is None:
            groups = self._collect(requests, finished=read_trajectories(sink), **arguments)
        statistics = self._runtime.result(self._coordinator.call("statistics"))
        for span in statistics.spans:
            self._recorder.lane(span.engine, kind, span.start_ns, span.end_ns, step=step, chunks=span.chunks)
        left = self._runtime.result(self._coordinator.call("left"))
        return Collected(groups, statistics, left)

    def _collect(self, requests: Sequence[RolloutRequest], **arguments: Any) -> list[Group] | None:
        """Engines that die in it are started anew; None when that was so of all."""
        call, done = self._coordinator.call("collect", requests, **arguments), []
        while not done:
            # The coordinator has a deadline for each engine call; here only its own death can be news, and engines'.
            done, _ = self._runtime.wait([call], timeout=POLL_S)
            progress = self._runtime.result(self._coordinator.observe("progress"))
            self._recorder.rollout_progress(progress.finished, progress.total)
            for death in progress.deaths[self._deaths:]:
                self._restart(death)
            self._deaths = len(progress.deaths)
        try:
            return self._runtime.result(call)
        except ComponentDied as death:
            if death.name not in self._engines.names:
                raise
            return None

    def publish(self, version: int, stream: Stream) -> dict[str, float]:
        """See `Publisher.publish`. Engines that have died since the last rollout, or hang, are started anew. stream:
        where the run is in its prompts."""
        while True:
            try:
                metrics = self._publisher.publish(version)
                self.stream = stream
                return metrics
            except ComponentDied as death:
                if death.name not in self._engines.names:
                    raise
                self._restart(death, restore=False)

    def _restart(self, death: ComponentDied, restore: bool = True) -> None:
        """Raises `death` when there have been too many. restore: give the engine the weights that the others have."""
        if not self._restarts:
            raise death
        self._restarts -= 1
        print(f"pbsd: {death.name} died: {death.cause}\npbsd: it is started anew, which may happen "
              f"{self._restarts} more times (rollout.engine_restarts)", file=sys.stderr)
        try:
            handle = self._engines.restart(death.name)
            if restore:
                self._publisher.restore(death.name)
        except ComponentDied as again:
            return self._restart(again, restore)
        self._runtime.result(self._coordinator.observe("join", handle))

    def _origin(self, sampling: Mapping[str, Any]) -> str:
        """All that decides how trajectories turn out, besides their prompts, which they have with them."""
        limits = self._config.rollout.model_dump(include={"max_turns", "max_turn_tokens", "max_context"})
        return json.dumps({"weights": self._publisher.published.digest, **sampling, **limits,
                           "environment": self._config.environment.model_dump(mode="json")}, sort_keys=True)

    def discard_unscored(self, but: str = "") -> None:
        """What the last rollout wrote has since been recorded with its scores."""
        for path in (self._recorder.folder / TRAJECTORIES).glob("*.unscored.*"):
            if path.stem != but:
                path.unlink()


class Collected(NamedTuple):
    """groups: that are complete. left: what `Coordinator.left` has."""

    groups: list[Group]
    statistics: CollectStatistics
    left: Sequence[Started] = ()


@dataclass
class Components:
    """reference: an engine that no weights are published to, if the algorithm compares with it.
    stream: where the run is in its prompts; the loop moves it on."""

    config: RunConfig
    recorder: Recorder
    environment: Environment
    learner: LearnerGroup
    publisher: Publisher
    rollout: Rollout
    reference: EngineGroup | None
    checkpoints: CheckpointStore
    start: Start

    def __post_init__(self) -> None:
        splits = {self.config.environment.train_split, self.config.evaluation.split}
        self.stream = self.start.stream
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
            collected = self.rollout.collect(
                requests, step, temperature=config.evaluation.temperature, kind="evaluation")
            return summary.of_evaluation(self.reward(collected.groups))

    def check(self, metrics: Mapping[str, float], evaluated: bool) -> None:
        """Raise what has gone wrong with checkpoints in the background, and that the one to choose the best by is no
        metric: early, while little is lost. `evaluated`: whether `metrics` are of an evaluation too."""
        self.checkpoints.check()
        best = self.config.checkpoint.best
        due = best is not None and (evaluated or not best.metric.startswith("eval/"))
        if due and (problem := unknown(best, metrics)):
            raise CheckpointError(problem)

    def save(self, step: int, metrics: Mapping[str, float]) -> None:
        """Begin a checkpoint to resume from; in the background it is committed, and exported in Hugging Face format.
        What fails there is raised by `check`, the next `save` or the end of the run."""
        # Parameters and two Adam moments; the estimate only has to catch a disk that cannot hold it.
        needed = 3 * int(self.publisher.nbytes)
        layout = self.config.learner.parallel.model_dump()
        ranks = [writer_name(rank) for rank in range(layout["world_size"])]
        contents = Contents(
            step, layout, {name: float(value) for name, value in metrics.items()},
            position(self.config, self.stream.asked))
        with self.checkpoints.writing(contents, needed, ranks, then=exporter(self.config, step)) as folder:
            for name, content in carried_file(self.stream).items():
                (folder / name).write_bytes(content)
            self.learner.save(str(folder.resolve() / LEARNER), wait=False)


def exporter(config: RunConfig, step: int) -> Callable[[Path], None] | None:
    """What writes the policy of this step's checkpoint, which it is given, as a Hugging Face folder, if that is asked
    for; those of checkpoints that have gone go too. CheckpointError when it cannot be written."""
    when, is_last = config.checkpoint.export_hf, step == config.steps
    if when == "never" or (when == "final" and not is_last):
        return None
    folder = config.folder / (EXPORTED if is_last else f"{EXPORTED}_step_{step}")

    def export(checkpoint: Path) -> None:
        try:
            export_checkpoint(checkpoint / LEARNER, Path(config.model.path), folder)
        except Exception as error:
            raise CheckpointError(
                f"{checkpoint} is complete, but could not be exported to {folder}: {error}") from error
        kept = {f"{EXPORTED}_{path.name}" for path in complete(checkpoint.parent)}
        for old in config.folder.glob(f"{EXPORTED}_step_*"):
            if old.name not in kept:
                shutil.rmtree(old)

    return export


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
def build(config: RunConfig, resume: str | None) -> Iterator[Components]:
    """All components of a run, whose records go to `<runs>/<name>`. `resume`: the checkpoint to continue from, None for
    a new run; the newest one need not exist."""
    check_engines(config)
    folder = config.folder
    with ExitStack() as stack:
        # Before the ranks, so that it ends when they have: what they have not written by then it gives up.
        checkpoints = stack.enter_context(
            CheckpointStore(folder / "checkpoints", config.checkpoint, config.learner.deadline_s))
        start = find_start(checkpoints, config, resume)
        first_row = start.done + 1 if start.done else 0
        recorder = stack.enter_context(Recorder(folder, config.observability, config, first_row))
        runtime = stack.enter_context(open_runtime(config.runtime, config.folder / "logs", config.ray_port))
        kv_pool = stack.enter_context(SharedFolder())
        learner, engines = start_learner(runtime, config), start_engines(runtime, config, kv_pool, folder / "logs")
        reference = start_reference(runtime, config)
        coordinator = start_coordinator(runtime, config, engines)
        environment = build_environment(config.environment, config.model.path)
        learner.ready()
        engines.ready()
        if reference is not None:
            reference.ready()
        if start.checkpoint is not None:
            learner.load(str((start.checkpoint / LEARNER).resolve()))
        if start.recovered is not None:
            learner.replace_weights(str(start.recovered.resolve()), (start.done - start.saved) * _updates(config))
        publisher = Publisher(learner, engines, _probe(environment, config), config.rollout.probe_tolerance)
        stack.callback(publisher.close)
        rollout = Rollout(runtime, coordinator, config, recorder, publisher, engines)
        stack.enter_context(leaving_weights(publisher, checkpoints.folder, config, lambda: rollout.stream))
        yield Components(config, recorder, environment, learner, publisher, rollout, reference, checkpoints, start)
        learner.saved()
        checkpoints.finish()
        rollout.discard_unscored()


def start_learner(runtime: Runtime, config: RunConfig) -> LearnerGroup:
    supervised = config.algorithm.name == "sft"
    loss = losses.build(config.algorithm) if supervised else credit.loss_of(config, on_policy=False)
    return LearnerGroup.spawn(
        runtime, build_learner, world_size=config.learner.parallel.world_size, deadline_s=config.learner.deadline_s,
        model=config.model, config=config.learner, loss=loss, seed=config.seed,
        total_steps=config.steps * _updates(config))


def _updates(config: RunConfig) -> int:
    """Optimizer steps of a training step."""
    return 1 if config.algorithm.name == "sft" else config.learner.updates_per_step


def build_learner(rank: int, rendezvous: str, **arguments: Any) -> Learner:
    """In the rank's own process: the driver never imports Megatron."""
    # Megatron warns of every GPU package that is absent; in a log's last lines that would hide what went wrong.
    warnings.filterwarnings("ignore", module=r"megatron\.core", category=UserWarning)
    from megatron_pbsd.learner.learner import Learner

    return Learner(rank, rendezvous, **arguments)


def start_engines(runtime: Runtime, config: RunConfig, kv_pool: SharedFolder, logs: Path) -> EngineGroup:
    """kv_pool: where embedded engines park KV. logs: of servers."""
    rollout, load_weights = config.rollout, config.model.initial_weights == "load"
    if rollout.engine == "sglang":
        return EngineGroup.spawn(
            runtime, start_sglang, count=rollout.engines,
            deadline_s=max(rollout.deadline_s, rollout.sglang.start_deadline_s), model_path=config.model.path,
            config=rollout, logs=str(logs.resolve()), load_weights=load_weights,
            routed_experts=config.learner.moe.routing_replay)
    return EngineGroup.spawn(
        runtime, build_engine, count=rollout.engines, deadline_s=rollout.deadline_s, model_path=config.model.path,
        slots=rollout.slots, max_context=rollout.max_context, load_weights=load_weights,
        kv_pool=PoolPlace(kv_pool.path, rollout.kv_pool_mb * 2**20, shared=rollout.divides),
        longest_draft=rollout.speculation.max_draft_tokens if rollout.speculation.enabled else None)


def check_engines(config: RunConfig) -> None:
    """UsageError with all that is wrong with what SGLang is to be started with. Asks SGLang, and starts nothing."""
    if config.rollout.engine != "sglang":
        return
    from megatron_pbsd.rollout.engines.sglang.arguments import problems

    if found := problems(config.rollout.sglang):
        raise UsageError("\n".join(found))


def start_reference(runtime: Runtime, config: RunConfig) -> EngineGroup | None:
    """The model that the run started from, as an engine that is never given other weights."""
    if config.algorithm.name == "sft" or "reference" not in credit.plan_of(config, on_policy=False).passes:
        return None
    handle = runtime.spawn(
        "reference", EngineHost, build_engine, name="reference", model_path=config.model.path, slots=1,
        max_context=config.rollout.max_context)
    return EngineGroup(runtime, [handle], config.rollout.deadline_s)


def build_engine(longest_draft: int | None = None, device: str = "cpu", **arguments: Any) -> Engine:
    """In the engine's own process: the driver never imports transformers. longest_draft: None does not speculate."""
    from megatron_pbsd.rollout.engines.embedded.engine import EmbeddedEngine

    if longest_draft is not None:
        from megatron_pbsd.rollout.engines.embedded.speculation import Speculation, clock_of

        arguments["speculation"] = Speculation(longest_draft, clock=clock_of(device))
    return EmbeddedEngine(device=device, **arguments)


def start_sglang(**arguments: Any) -> Engine:
    """In the engine's own process, which starts a server."""
    from megatron_pbsd.rollout.engines.sglang.build import build_sglang_engine

    return build_sglang_engine(**arguments)


def start_coordinator(runtime: Runtime, config: RunConfig, engines: EngineGroup) -> Handle:
    return runtime.spawn("coordinator", build_coordinator, engines.handles, config, runtime.client)


def _probe(environment: Environment, config: RunConfig) -> list[tuple[int, ...]]:
    """Prompts with their answers disclosed twice over: long enough to exercise attention, the same in every run."""
    tasks = environment.tasks(config.evaluation.split)[:PROBE_SEQUENCES]
    return [environment.prompt(task) + environment.privileged_prompt(task, task.answers[0]) for task in tasks]

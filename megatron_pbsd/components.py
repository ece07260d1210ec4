"""From a configuration to the components that a loop is handed, started in order and stopped in reverse."""

from __future__ import annotations

import dataclasses
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_pbsd import credit, losses, summary
from megatron_pbsd.checkpointing.errors import CheckpointError
from megatron_pbsd.checkpointing.fsck import LEARNER
from megatron_pbsd.checkpointing.hf_export import export_checkpoint
from megatron_pbsd.checkpointing.manifest import Contents
from megatron_pbsd.checkpointing.retention import unknown
from megatron_pbsd.checkpointing.store import CheckpointStore, complete
from megatron_pbsd.checkpointing.torch_dist import writer_name
from megatron_pbsd.config import RunConfig, SpeculationConfig
from megatron_pbsd.controller.placement import Demand
from megatron_pbsd.controller.runtime import Handle, Runtime, open_runtime
from megatron_pbsd.environments import Environment, build_environment
from megatron_pbsd.errors import UsageError
from megatron_pbsd.handover import HandOver
from megatron_pbsd.learner.group import LearnerGroup
from megatron_pbsd.memory_account import predict
from megatron_pbsd.memory_meter import MemoryMeter
from megatron_pbsd.models import family
from megatron_pbsd.models.hf_config import read
from megatron_pbsd.observability.recorder import Recorder
from megatron_pbsd.platform import select
from megatron_pbsd.prompts import evaluation_requests, position
from megatron_pbsd.resharding.broadcast import CollectiveTransport
from megatron_pbsd.resharding.disk import DiskTransport
from megatron_pbsd.resharding.ipc import IPCTransport
from megatron_pbsd.resharding.publication import Publisher
from megatron_pbsd.resharding.stream import plan_for
from megatron_pbsd.resharding.transport import BucketsTransport, SegmentTransport, Transport
from megatron_pbsd.resume import Start, carried_file, find_start, leaving_weights
from megatron_pbsd.rollout.coordinator import build_coordinator
from megatron_pbsd.rollout.engine_group import EngineGroup
from megatron_pbsd.rollout.engines.embedded.kv_pool import PoolPlace
from megatron_pbsd.rollout.engines.host import EngineHost
from megatron_pbsd.rollout.engines.protocol import Engine
from megatron_pbsd.rollout.engines.sglang.arguments import ranks
from megatron_pbsd.rollouts import Rollout
from megatron_pbsd.trajectory import Group

if TYPE_CHECKING:
    from megatron_pbsd.learner.learner import Learner
    from megatron_pbsd.rollout.engines.sglang.member import Member

PROBE_SEQUENCES = 4
EXPORTED = "exported"
REFERENCE, DRIVER = "reference", "the driver"


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
    hand_over: HandOver
    meter: MemoryMeter
    reference: EngineGroup | None
    checkpoints: CheckpointStore
    start: Start

    def __post_init__(self) -> None:
        splits = {self.config.environment.train_split, self.config.evaluation.split}
        self.stream = self.start.stream
        self._tasks = {task.task_id: task for split in splits for task in self.environment.tasks(split)}

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
        self.hand_over.save()
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
def build(config: RunConfig, resume: str | None, ray_address: str | None = None) -> Iterator[Components]:
    """All components of a run, whose records go to `<runs>/<name>`. `resume`: the checkpoint to continue from, None for
    a new run; the newest one need not exist. ray_address: of a Ray cluster to run on, None for one of its own."""
    check_engines(config)
    folder = config.folder
    with ExitStack() as stack:
        # Before the ranks, so that it ends when they have: what they have not written by then it gives up.
        checkpoints = stack.enter_context(
            CheckpointStore(folder / "checkpoints", config.checkpoint, config.learner.deadline_s))
        start = find_start(checkpoints, config, resume)
        first_row = start.done + 1 if start.done else 0
        recorder = stack.enter_context(Recorder(folder, config.observability, config, first_row))
        runtime = stack.enter_context(
            open_runtime(config.runtime, folder / "logs", config.ray_port, ray_address, demand(config)))
        check_machines(config, runtime)
        check_transport(config, runtime)
        learner, engines = start_learner(runtime, config), start_engines(runtime, config, folder / "logs")
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
        meter = MemoryMeter(predict(config, select()), (learner, engines))
        hand_over = HandOver(learner, engines, config, meter.leaving)
        publisher = Publisher(build_transport(config, learner, engines), learner, engines,
                              _probe(environment, config), config.rollout.probe_tolerance, hand_over.rollout)
        stack.callback(publisher.close)
        rollout = Rollout(runtime, coordinator, config, recorder, publisher, engines, hand_over)
        stack.enter_context(leaving_weights(publisher, checkpoints.folder, config, lambda: rollout.stream))
        yield Components(config, recorder, environment, learner, publisher, rollout, hand_over, meter, reference,
                         checkpoints, start)
        learner.saved()
        checkpoints.finish()
        rollout.discard_unscored()


def demand(config: RunConfig) -> Demand:
    """What is spread over the machines of a cluster."""
    size = ranks(config.rollout.sglang) if config.rollout.engine == "sglang" else 1
    engines = {f"engine-{number}": size for number in range(config.rollout.engines)}
    asked = config.rollout.sglang.args.get("nnodes")
    machines = {} if asked is None else dict.fromkeys(engines, asked)
    if needs_reference(config):
        engines[REFERENCE] = 1
    parallel = config.learner.parallel
    return Demand(parallel.world_size, parallel.tp, engines, config.learner.release_memory, machines)


def check_machines(config: RunConfig, runtime: Runtime) -> None:
    """UsageError when engines are to be on more machines than there are: without a cluster there is one."""
    asked, there = config.rollout.sglang.args.get("nnodes", 1), len(runtime.parts("engine-0"))
    if asked != there and asked > 1:
        raise UsageError(
            f"rollout.sglang.args.nnodes = {asked} wants each engine on {asked} machines, and there is one: the "
            "nearest valid value is 1, or start on a cluster (--ray-address, cluster.nodes)")


def check_transport(config: RunConfig, runtime: Runtime) -> None:
    """UsageError when new weights cannot get to the engines because they are on other machines."""
    kind, learner = config.rollout.transport.kind, [
        f"learner-{rank}" for rank in range(config.learner.parallel.world_size)]
    engines = [part for number in range(config.rollout.engines) for part in runtime.parts(f"engine-{number}")]
    if kind not in ("segment", "buckets", "ipc"):
        return
    names = [learner[0], *engines] if kind == "ipc" else [DRIVER, *learner, *engines]
    machines = {name: runtime.machine(name) for name in names}
    home = machines[names[0]]
    away = [f"{name} on {machine.name}" for name, machine in machines.items() if machine.address != home.address]
    if away:
        raise UsageError(
            f"rollout.transport.kind = {kind!r} is between processes of one machine, but {names[0]} is on {home.name} "
            f"and {', '.join(away)}; the nearest valid value is 'collective', or 'disk' with a folder that all "
            "machines share")


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


def start_engines(runtime: Runtime, config: RunConfig, logs: Path) -> EngineGroup:
    """logs: of servers."""
    rollout, load_weights = config.rollout, config.model.initial_weights == "load"
    if rollout.engine == "sglang":
        return EngineGroup.spawn(
            runtime, start_sglang, count=rollout.engines,
            deadline_s=max(rollout.deadline_s, rollout.sglang.start_deadline_s), model_path=config.model.path,
            config=rollout, logs=str(logs.resolve()), load_weights=load_weights,
            routed_experts=config.learner.moe.routing_replay, by_machine=lambda machine: {"device": machine.device},
            member=start_member)
    return EngineGroup.spawn(
        runtime, build_engine, count=rollout.engines, deadline_s=rollout.deadline_s, model_path=config.model.path,
        slots=rollout.slots, max_context=rollout.max_context, load_weights=load_weights,
        speculation=rollout.speculation, by_machine=lambda machine: {
            "kv_pool": PoolPlace(machine.memory_folder(), rollout.kv_pool_mb * 2**20, shared=rollout.divides)})


def build_transport(config: RunConfig, learner: LearnerGroup, engines: EngineGroup) -> Transport:
    """Between these; both have been constructed."""
    chosen, hf = config.rollout.transport, read(config.model.path)
    decoder = family(hf).decoder(hf)
    plan = plan_for(decoder, config.learner.parallel, learner.tensors(),
                    None if chosen.kind == "segment" else chosen.bucket_mb << 20)
    if chosen.kind == "segment":
        return SegmentTransport(learner, engines, plan)
    if chosen.kind == "buckets":
        return BucketsTransport(learner, engines, plan)
    sglang = config.rollout.engine == "sglang"
    size = ranks(config.rollout.sglang) if sglang else 1
    if chosen.kind == "ipc":
        return IPCTransport(learner, engines, plan, engine_ranks=size)
    if chosen.kind == "collective":
        backend = "nccl" if sglang and config.rollout.sglang.args.get("device") != "cpu" else "gloo"
        return CollectiveTransport(
            learner, engines, plan, decoder=decoder, engine_ranks=size, meeting_point=learner.meeting_point,
            deadline_s=config.rollout.deadline_s / 2, backend=backend)
    folder = Path(chosen.folder) if chosen.folder else config.folder / "weights"
    return DiskTransport(learner, engines, plan, folder.resolve(), chosen.deltas)


def check_engines(config: RunConfig) -> None:
    """UsageError with all that is wrong with what SGLang is to be started with. Asks SGLang, and starts nothing."""
    if config.rollout.engine != "sglang":
        return
    from megatron_pbsd.rollout.engines.sglang.arguments import problems

    if found := problems(config.rollout.sglang):
        raise UsageError("\n".join(found))


def needs_reference(config: RunConfig) -> bool:
    return config.algorithm.name != "sft" and "reference" in credit.plan_of(config, on_policy=False).passes


def start_reference(runtime: Runtime, config: RunConfig) -> EngineGroup | None:
    """The model that the run started from, as an engine that is never given other weights."""
    if not needs_reference(config):
        return None
    handle = runtime.spawn(
        REFERENCE, EngineHost, build_engine, name=REFERENCE, model_path=config.model.path, slots=1,
        max_context=config.rollout.max_context)
    return EngineGroup(runtime, [handle], config.rollout.deadline_s)


def build_engine(speculation: SpeculationConfig | None = None, device: str = "cpu", **arguments: Any) -> Engine:
    """In the engine's own process: the driver never imports transformers. speculation: None is as if not enabled."""
    from megatron_pbsd.rollout.engines.embedded.engine import EmbeddedEngine

    if speculation is not None and speculation.enabled:
        from megatron_pbsd.rollout.engines.embedded.speculation import Speculation, clock_of

        arguments["speculation"] = Speculation(
            speculation.max_draft_tokens, speculation.paths, clock=clock_of(device))
    return EmbeddedEngine(device=device, **arguments)


def start_sglang(**arguments: Any) -> Engine:
    """In the engine's own process, which starts a server."""
    from megatron_pbsd.rollout.engines.sglang.build import build_sglang_engine

    return build_sglang_engine(**arguments)


def start_member(**arguments: Any) -> Member:
    """In a process of its own on a further machine of an engine."""
    from megatron_pbsd.rollout.engines.sglang.build import build_member

    return build_member(**arguments)


def start_coordinator(runtime: Runtime, config: RunConfig, engines: EngineGroup) -> Handle:
    return runtime.spawn("coordinator", build_coordinator, engines.handles, config, runtime.client)


def _probe(environment: Environment, config: RunConfig) -> list[tuple[int, ...]]:
    """Prompts with their answers disclosed twice over: long enough to exercise attention, the same in every run."""
    tasks = environment.tasks(config.evaluation.split)[:PROBE_SEQUENCES]
    return [environment.prompt(task) + environment.privileged_prompt(task, task.answers[0]) for task in tasks]

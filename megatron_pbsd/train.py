"""The training loop. Everything else is a component it is handed.

    weights      rollout.publish(version)              learner -> engines, in place, verified
    rollout      rollout.collect(requests, carried)    multi-turn trajectories, tools; token in, token out
    reward       environment.score                     verified answer -> reward
    log_probs    credit.plan_for, credit.prepare       the forward passes that are needed -> advantage per token
    train        learner.step(batch)                   micro-batches -> forward_backward_func(loss hook) -> optimizer
    evaluation, checkpoint, and the recorder that keeps all of it

Step s trains weights version s - 1 on rollouts and makes version s; row 0 of the metrics is the starting policy. With
over-sampling a step leaves groups unfinished, and `run.stream` carries them to the next (docs/partial_rollouts.md).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from megatron_pbsd import credit, staleness, summary
from megatron_pbsd.batch import from_trajectories
from megatron_pbsd.components import Components, build
from megatron_pbsd.config import RunConfig
from megatron_pbsd.environments.search_qa.demonstrations import Demonstrator
from megatron_pbsd.prompts import Stream, informative, mini_batches, per_step, requests
from megatron_pbsd.rollout.request import Started
from megatron_pbsd.rollouts import Collected
from megatron_pbsd.stopping import StopRequest
from megatron_pbsd.trajectory import Group


def main(config: RunConfig, resume: str | None, stop: StopRequest, ray_address: str | None = None) -> int:
    """Run `config` to its last step, from the checkpoint `resume` (`step_40`, `latest`, `best`) if given, or to the end
    of the step in which `stop` asks, with a checkpoint then. The last step that is done.

    ray_address: 'host:port' of a Ray cluster to run on; None starts one on this machine.

    Failures derive from `errors.PbsdError` and name the component at fault.
    """
    train = train_supervised if config.algorithm.name == "sft" else train_with_rewards
    with build(config, resume, ray_address) as run:
        return train(run, stop)


def train_with_rewards(run: Components, stop: StopRequest) -> int:
    config, recorder, step = run.config, run.recorder, run.start.done
    start(run)
    for step in range(run.start.done + 1, config.steps + 1):
        groups, others, left, metrics = roll_out(config, partial(ask_prompts, run, step))
        metrics |= age(run, step, groups, left)
        with recorder.phase("log_probs"):
            run.hand_over.train()
            plan = credit.plan_for(config, groups, version=step - 1)
            batch, credited = credit.prepare(plan, groups, run.learner, run.reference)
        with recorder.phase("train"):
            parts = mini_batches(groups, batch, config.learner.updates_per_step)
            updates = [run.learner.step(part, plan.loss) for part in parts]
            metrics |= summary.of_updates([update.metrics for update in updates])
        groups, credit_metrics = credit.conclude(plan, groups, batch, credited, updates)
        recorder.trajectories(step, groups + others, run.environment.decode)
        if finish(run, step, metrics | credit_metrics, run.stream.after(config, left), stop):
            break
    return step


def roll_out(
    config: RunConfig, ask: Callable[[int], Collected]
) -> tuple[list[Group], list[Group], list[Started], dict[str, float]]:
    """The groups to train on, those that are not, all with rewards, those that are not complete, and metrics.

    ask:  attempt, from 0 → the scored groups of further prompts, and what the engines did.

    With `sampling_attempts` above 1 prompts are asked until as many groups as were wanted are informative.
    """
    asked, statistics, left = [], [], []
    attempts, wanted = config.algorithm.sampling_attempts, config.rollout.prompts_per_step
    for attempt in range(attempts):
        collected = ask(attempt)
        asked += collected.groups
        left += collected.left
        statistics.append(collected.statistics)
        if len(informative(asked)) >= wanted:
            break
    chosen = informative(asked)[:wanted] if attempts > 1 else asked
    chosen = chosen or asked[:wanted]
    ids = {group.group_id for group in chosen}
    others = [group for group in asked if group.group_id not in ids]
    return chosen, others, left, summary.of_engines(statistics) | summary.of_rollout(asked)


def ask_prompts(run: Components, step: int, attempt: int) -> Collected:
    """Rollout `attempt` of a training step, verified. With over-sampling it ends before all groups are complete."""
    config = run.config.rollout
    tasks = run.environment.tasks(run.config.environment.train_split)
    with run.recorder.phase("rollout"):
        prompts = requests(run.environment, tasks, run.config, run.stream, attempt)
        collected = run.rollout.collect(prompts, step, attempt=attempt, carried=run.stream.carried,
                                        wanted=config.prompts_per_step if config.over_sampling > 1 else None)
    with run.recorder.phase("reward"):
        return collected._replace(groups=run.reward(collected.groups))


def age(run: Components, step: int, groups: list[Group], left: list[Started]) -> dict[str, float]:
    """Hold the step's groups to the bound of staleness; metrics of a step that over-samples."""
    config, stream = run.config.rollout, run.stream
    staleness.check(groups, step - 1, config.max_staleness)
    if config.over_sampling == 1:
        return {}
    return staleness.metrics(config, stream, per_step(run.config, len(stream.carried)), groups, left, step - 1)


def train_supervised(run: Components, stop: StopRequest) -> int:
    config, recorder, step = run.config, run.recorder, run.start.done
    demonstrator = Demonstrator(run.environment, config.algorithm, config.environment.train_split, config.seed)
    size = config.algorithm.sequences_per_step
    start(run)
    for step in range(run.start.done + 1, config.steps + 1):
        with recorder.phase("train"):
            run.hand_over.train()
            first = run.stream.asked
            batch = from_trajectories([demonstrator.demonstration(first + i) for i in range(size)])
            metrics = run.learner.step(batch).metrics
        if finish(run, step, metrics, run.stream.after(config), stop):
            break
    return step


def start(run: Components) -> None:
    """Give the engines the learner's weights, new or resumed, and evaluate the starting policy."""
    with run.recorder.phase("weights"):
        metrics = run.rollout.publish(run.start.done, run.stream)
    if run.start.done == 0:
        run.recorder.log(0, metrics | run.evaluate(0) if run.config.evaluation.at_start else metrics)


def finish(run: Components, step: int, metrics: dict[str, float], stream: Stream, stop: StopRequest) -> bool:
    """Publish the step's weights, evaluate and save where that is due, and write the step's row. Whether the run has
    been asked to end here, with all that is needed to go on saved.

    stream: where the step leaves the run in its prompts.
    """
    run.stream = stream
    config, recorder = run.config, run.recorder
    metrics |= run.start.metrics(step)
    evaluating, stopping = is_due(step, config.evaluation.every, config), bool(stop)
    saving = stopping or is_due(step, config.checkpoint.every, config)
    if config.algorithm.name != "sft" or evaluating:
        with recorder.phase("weights"):
            metrics |= run.rollout.publish(step, stream)
    if evaluating:
        metrics |= run.evaluate(step)
    metrics |= run.meter.metrics()
    run.check(metrics, evaluating)
    if saving:
        with recorder.phase("checkpoint"):
            run.save(step, metrics)
    recorder.log(step, metrics)
    return stopping


def is_due(step: int, every: int, config: RunConfig) -> bool:
    return step == config.steps or (every > 0 and step % every == 0)

"""Which prompts a step asks, and which trajectories an optimizer step sees. Pure functions of (seed, step).

There is no data-loader state: a resumed run asks what the uninterrupted one would have asked.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron_pbsd.batch import Batch
from megatron_pbsd.config import PrivilegedConfig, RunConfig
from megatron_pbsd.environments import Environment, Task
from megatron_pbsd.errors import UsageError
from megatron_pbsd.rollout.coordinator import RolloutRequest
from megatron_pbsd.trajectory import Group


def requests(environment: Environment, tasks: Sequence[Task], config: RunConfig, step: int,
             attempt: int = 0) -> list[RolloutRequest]:
    """The prompts of rollout `attempt` (from 0) of training step `step` (from 1), each asked for a whole group.

    Every epoch is a new permutation of all tasks, so no prompt repeats before the epoch is over. What a step asks does
    not depend on how many attempts the steps before it took: prompts are set aside for all of them.
    """
    count = config.rollout.prompts_per_step
    first = ((step - 1) * config.algorithm.sampling_attempts + attempt) * count
    chosen = tasks_between(tasks, config.seed, first, first + count)
    answers = disclosed_answers(environment, chosen, config)
    return [
        RolloutRequest(str(attempt * count + i), task, config.rollout.group_size, answer)
        for i, (task, answer) in enumerate(zip(chosen, answers, strict=True))
    ]


def informative(groups: Sequence[Group]) -> list[Group]:
    """Groups whose rewards are not all equal: the others have no advantage."""
    return [group for group in groups if len({t.reward for t in group.trajectories}) > 1]


def evaluation_requests(tasks: Sequence[Task], config: RunConfig) -> list[RolloutRequest]:
    """A fixed sample of the evaluation split, each asked once; the same for every step and seed."""
    chosen = random.Random("evaluation").sample(list(tasks), min(config.evaluation.prompts, len(tasks)))
    return [RolloutRequest(f"evaluation/{i}", task, 1, task.answers[0]) for i, task in enumerate(chosen)]


def tasks_between(tasks: Sequence[Task], seed: int, start: int, stop: int) -> list[Task]:
    """Positions [start, stop) of the endless stream of epochs."""
    chosen = []
    for epoch in range(start // len(tasks), -(-stop // len(tasks))):
        order = list(range(len(tasks)))
        random.Random(f"{seed}/{epoch}").shuffle(order)
        first = epoch * len(tasks)
        chosen += [tasks[i] for i in order[max(start - first, 0) : stop - first]]
    return chosen


def position(config: RunConfig, step: int) -> dict[str, Any]:
    """Where in its data a run is after `step`: what decides the order of prompts, and how many are behind it."""
    return _order(config) | {"prompts": step * _per_step(config)}


def check_position(saved: Mapping[str, Any], config: RunConfig, step: int) -> str | None:
    """Compare `position` of a checkpoint of `step` with where a run with `config` goes on from.

    UsageError naming every key that makes it another order of prompts. With another number of prompts per step the
    order is the same: what is then asked twice, or never, is returned as a sentence.
    """
    if different := {key: value for key, value in _order(config).items() if saved.get(key) != value}:
        raise UsageError(
            "a resumed run asks its prompts in the order that it began with, which these keys would change: "
            + "; ".join(f"{key} = {value!r}, the checkpoint was made with {saved.get(key)!r}"
                        for key, value in different.items())
            + ". Set them back, or begin a new run with the exported policy")
    behind, here = saved["prompts"], step * _per_step(config)
    if behind == here:
        return None
    first, last = min(behind, here), max(behind, here) - 1
    return (f"step {step + 1} goes on at prompt {here} of the stream, with {_per_step(config)} prompts a step; the "
            f"checkpoint ends at {behind}: prompts {first} to {last} are "
            + ("asked again" if here < behind else "left out"))


def _order(config: RunConfig) -> dict[str, Any]:
    environment = config.environment
    return {"seed": config.seed, "environment.name": environment.name,
            "environment.train_split": environment.train_split, "environment.hops": list(environment.hops)}


def _per_step(config: RunConfig) -> int:
    if config.algorithm.name == "sft":
        return config.algorithm.sequences_per_step
    return config.rollout.prompts_per_step * config.algorithm.sampling_attempts


def disclosed_answers(environment: Environment, tasks: Sequence[Task], config: RunConfig) -> list[str]:
    """What the privileged prompt discloses: the verified answer, or a control's stand-in for it (docs/pbsd.md)."""
    control = config.algorithm.teacher_answer if isinstance(config.algorithm, PrivilegedConfig) else "verified"
    answers = [task.answers[0] for task in tasks]
    if control == "shuffled":
        # A rotation: no prompt is given its own answer.
        return answers[1:] + answers[:1]
    if control == "neutral":
        return [environment.neutral_text(answer) for answer in answers]
    return answers


def mini_batches(groups: Sequence[Group], batch: Batch, count: int) -> Iterator[Batch]:
    """Deal whole groups to `count` optimizer steps; `batch` holds their trajectories in order."""
    members, start = [], 0
    for group in groups:
        members.append(range(start, start + len(group.trajectories)))
        start += len(group.trajectories)
    for k in range(count):
        indices = [i for member in members[k::count] for i in member]
        if indices:
            yield batch.select(indices)

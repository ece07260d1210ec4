"""Which prompts a step asks, and which trajectories an optimizer step sees. Pure.

The order of prompts is a function of the seed; all that a run keeps is how many of them are behind it, and the groups
that it has begun and not trained on (`Stream`). A resumed run asks what the uninterrupted one would have asked.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_pbsd.batch import Batch
from megatron_pbsd.config import PrivilegedConfig, RunConfig
from megatron_pbsd.environments import Environment, Task
from megatron_pbsd.errors import UsageError
from megatron_pbsd.rollout.request import RolloutRequest, Started
from megatron_pbsd.trajectory import Group


@dataclass(frozen=True)
class Stream:
    """Where a run is in its prompts, between two steps.

    asked:    prompts of the stream, or demonstrations, that are behind it.
    carried:  groups that were begun and are to be trained on, in the order in which they were asked for.
    """

    asked: int = 0
    carried: tuple[Started, ...] = ()

    def after(self, config: RunConfig, left: Sequence[Started] = ()) -> Stream:
        """After one more step, which left these groups. Nothing is carried where `max_staleness` does not allow it."""
        return Stream(self.asked + per_step(config, len(self.carried)),
                      tuple(left) if config.rollout.max_staleness else ())


def per_step(config: RunConfig, carried: int = 0) -> int:
    """Prompts of the stream that a step takes when so many groups are carried to it. They are set aside for all its
    attempts, whether or not these are made."""
    if config.algorithm.name == "sft":
        return config.algorithm.sequences_per_step
    return max(0, config.rollout.prompts_in_flight - carried) * config.algorithm.sampling_attempts


def requests(environment: Environment, tasks: Sequence[Task], config: RunConfig, stream: Stream,
             attempt: int = 0) -> list[RolloutRequest]:
    """The prompts of rollout `attempt` (from 0) of the step that begins at `stream`, each asked for a whole group.

    Every epoch is a new permutation of all tasks, so no prompt repeats before the epoch is over. What a step asks does
    not depend on how many attempts the steps before it took. Group ids are the smallest numbers that differ from those
    of the other attempts, and from those of carried groups.
    """
    count = per_step(config, len(stream.carried)) // config.algorithm.sampling_attempts
    first = stream.asked + attempt * count
    chosen = tasks_between(tasks, config.seed, first, first + count)
    answers = disclosed_answers(environment, chosen, config)
    taken = {group.group_id for group in stream.carried}
    free = (number for number in map(str, itertools.count(attempt * count)) if number not in taken)
    return [RolloutRequest(next(free), task, config.rollout.group_size, answer)
            for task, answer in zip(chosen, answers, strict=True)]


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


def position(config: RunConfig, asked: int) -> dict[str, Any]:
    """Where in its data a run is: what decides the order of prompts, and how many are behind it."""
    return _order(config) | {"prompts": asked}


def check_position(saved: Mapping[str, Any], config: RunConfig) -> int:
    """How many prompts are behind a checkpoint of this `position`.

    UsageError naming every key with which `config` makes it another order of prompts. Another number of prompts per
    step is none: the run goes on where the checkpoint ends.
    """
    if different := {key: value for key, value in _order(config).items() if saved.get(key) != value}:
        raise UsageError(
            "a resumed run asks its prompts in the order that it began with, which these keys would change: "
            + "; ".join(f"{key} = {value!r}, the checkpoint was made with {saved.get(key)!r}"
                        for key, value in different.items())
            + ". Set them back, or begin a new run with the exported policy")
    return saved["prompts"]


def _order(config: RunConfig) -> dict[str, Any]:
    environment = config.environment
    return {"seed": config.seed, "environment.name": environment.name,
            "environment.train_split": environment.train_split, "environment.hops": list(environment.hops)}


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

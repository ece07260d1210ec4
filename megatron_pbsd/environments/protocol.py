"""What an environment is: tasks with verified answers, and replies to what the policy does.

Environments are stateless between calls: all state of an episode is in its turns, so that a trajectory can be
resumed, moved or replayed anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_pbsd.trajectory import Trajectory, Turn, TurnKind


@dataclass(frozen=True)
class Task:
    """A question whose answer is verified. `answers[0]` is canonical, the rest are aliases.

    gold_passages: ids of the passages that hold the needed facts, in order. For analysis of credit only: neither the
    policy nor the teacher ever sees them.
    """

    task_id: str
    question: str
    answers: tuple[str, ...]
    hops: int
    gold_passages: tuple[int, ...] = ()


@dataclass(frozen=True)
class Reply:
    """What a turn meant and what the policy reads next. `done`: the episode is over (observation is empty then)."""

    kind: TurnKind
    observation: tuple[int, ...]
    done: bool
    answer_span: tuple[int, int] | None = None


@dataclass(frozen=True)
class Score:
    reward: float
    measures: dict[str, float]


class Environment(Protocol):
    stop_token_ids: tuple[int, ...]
    pad_token_id: int

    def tasks(self, split: str) -> Sequence[Task]:
        """All tasks of a split, in a fixed order. KeyError-like ValueError naming the known splits."""

    def prompt(self, task: Task) -> tuple[int, ...]:
        """Token ids the student starts from."""

    def privileged_prompt(self, task: Task, answer: str) -> tuple[int, ...]:
        """The same with `answer` disclosed: the teacher's (docs/pbsd.md, 'Setting')."""

    def neutral_text(self, answer: str) -> str:
        """Text of as many tokens as `answer` that says nothing: a control for the teacher."""

    def reply(self, task: Task, turns: Sequence[Turn], tokens: Sequence[int]) -> Reply:
        """Answer the newly generated `tokens`, given the earlier turns. Malformed input gets an observation."""

    def score(self, task: Task, trajectory: Trajectory) -> Score:
        """Verify the final answer."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Text with its special tokens, for people."""

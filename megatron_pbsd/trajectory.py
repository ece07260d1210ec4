"""What a rollout produces: groups of trajectories, each a sequence of turns.

Token in, token out: every token id that the policy generated or read is kept as it was; nothing is ever
re-tokenised between turns, or between rollout and training.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np

FinishReason = Literal["stop", "length", "abort"]
TurnKind = Literal["search", "answer", "malformed", "truncated"]

NOT_ROUTED = -1
"""In place of an expert: no choice is known or prescribed."""


@dataclass(frozen=True)
class VersionSpan:
    """Weights `version` produced generated tokens `[start, end)` of a turn."""

    version: int
    start: int
    end: int


@dataclass(frozen=True)
class Turn:
    """One move of the policy and what the environment answered.

    tokens:       ids the policy generated, the stop token included; these alone are trained on and scored.
    log_probs:    one per token: log-probability under the sampling distribution at temperature 1 (nats).
    observation:  ids the environment appended after the turn; read by the policy, never trained on.
    kind:         how the environment understood the turn.
    answer_span:  half-open range inside `tokens` that holds the final answer's text, if there is one.
    versions:     which weights generated which tokens; covers `tokens` without gaps.
    """

    tokens: tuple[int, ...]
    log_probs: tuple[float, ...]
    observation: tuple[int, ...]
    kind: TurnKind
    finish_reason: FinishReason
    versions: tuple[VersionSpan, ...]
    answer_span: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.log_probs):
            raise ValueError(f"a turn has {len(self.tokens)} tokens but {len(self.log_probs)} log-probs")
        covered = 0
        for span in self.versions:
            if span.start != covered or span.end < span.start:
                raise ValueError(f"version spans {self.versions} do not cover the turn's tokens in order")
            covered = span.end
        if covered != len(self.tokens):
            raise ValueError(f"version spans cover {covered} of {len(self.tokens)} tokens")


@dataclass(frozen=True, eq=False)
class Trajectory:
    """A prompt and the turns that followed it.

    trajectory_id:      unique in a run, and the key of counter-based sampling: `{step}/{group}/{sample}`.
    group_id:           the trajectories that share a prompt; baselines are keyed by it, never by position.
    prompt:             ids the student is conditioned on.
    privileged_prompt:  ids the teacher is conditioned on: the same prompt with the verified answer in it.
    reward:             outcome reward; None until the environment has scored the trajectory.
    scores:             further outcome measures (exact_match, f1, …) for reporting.
    evidence:           one number per turn (docs/pbsd.md: e_k, nats), filled in by algorithms that compute it.
    routed_experts:     int16 [tokens of prompt and continuation, MoE layers, top-k]: the experts that read each token
                        in the engine, in the order of choice; NOT_ROUTED where none did (the last token). None if
                        the rollout did not ask, and for dense models.
    """

    trajectory_id: str
    group_id: str
    task_id: str
    prompt: tuple[int, ...]
    privileged_prompt: tuple[int, ...]
    turns: tuple[Turn, ...]
    reward: float | None = None
    scores: dict[str, float] = field(default_factory=dict)
    evidence: tuple[float, ...] | None = None
    turn_advantages: tuple[float, ...] | None = None
    routed_experts: np.ndarray | None = None

    def __post_init__(self) -> None:
        if (experts := self.routed_experts) is None:
            return
        tokens = len(self.prompt) + len(self.continuation)
        if experts.dtype != np.int16 or experts.ndim != 3 or len(experts) != tokens:
            raise ValueError(f"routed experts of {self.trajectory_id!r} are {experts.dtype}{list(experts.shape)}, "
                             f"expected int16[{tokens}, MoE layers, top-k]")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Trajectory):
            return NotImplemented
        mine, others = dict(vars(self)), dict(vars(other))
        return np.array_equal(mine.pop("routed_experts"), others.pop("routed_experts")) and mine == others

    @property
    def continuation(self) -> tuple[int, ...]:
        """Everything after the prompt: generated tokens and observations, in order."""
        return tuple(t for turn in self.turns for t in (*turn.tokens, *turn.observation))

    @property
    def generated(self) -> int:
        return sum(len(turn.tokens) for turn in self.turns)

    @property
    def complete(self) -> bool:
        """Ended by the policy's own answer rather than cut by a limit."""
        return bool(self.turns) and self.turns[-1].kind == "answer"

    def with_scores(self, reward: float, scores: dict[str, float]) -> Trajectory:
        return replace(self, reward=reward, scores=dict(scores))

    def to_json(self) -> dict[str, Any]:
        data = asdict(self)
        experts = data.pop("routed_experts")
        return data if experts is None else {**data, "routed_experts": encoded(experts)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Trajectory:
        """Inverse of `to_json`; an unknown or missing key is an error (TypeError), never dropped."""
        data = dict(data)
        turns = []
        for raw in data.pop("turns"):
            raw = dict(raw)
            versions = tuple(VersionSpan(**v) for v in raw.pop("versions"))
            span = raw.pop("answer_span")
            for key in ("tokens", "log_probs", "observation"):
                raw[key] = tuple(raw[key])
            turns.append(Turn(**raw, versions=versions, answer_span=None if span is None else tuple(span)))
        for key in ("prompt", "privileged_prompt", "evidence", "turn_advantages"):
            if data.get(key) is not None:
                data[key] = tuple(data[key])
        if "routed_experts" in data:
            data["routed_experts"] = decoded(data["routed_experts"])
        return cls(**data, turns=tuple(turns))


def encoded(experts: np.ndarray) -> dict[str, Any]:
    """As JSON: the bytes in base64, one per entry where a byte holds them all."""
    stored = experts.astype("i1" if experts.max(initial=0) <= 127 else "<i2")
    data = base64.b64encode(stored.tobytes()).decode("ascii")
    return {"dtype": stored.dtype.str, "shape": list(stored.shape), "base64": data}


def decoded(data: dict[str, Any]) -> np.ndarray:
    """Inverse of `encoded`: int16 [T, MoE layers, top-k]."""
    stored = np.frombuffer(base64.b64decode(data["base64"]), data["dtype"])
    return stored.reshape(data["shape"]).astype(np.int16)


@dataclass(frozen=True)
class Group:
    """All trajectories of one prompt in one step. Sizes may differ between groups."""

    group_id: str
    trajectories: tuple[Trajectory, ...]

    def __post_init__(self) -> None:
        strangers = [t.trajectory_id for t in self.trajectories if t.group_id != self.group_id]
        if strangers:
            raise ValueError(f"group {self.group_id!r} was given trajectories of other groups: {strangers}")


def trajectories_of(groups: Sequence[Group]) -> list[Trajectory]:
    return [t for group in groups for t in group.trajectories]

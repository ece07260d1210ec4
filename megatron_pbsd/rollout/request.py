"""What a rollout is asked for, and groups on their way to it: plain data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from megatron_pbsd.environments.protocol import Task
from megatron_pbsd.trajectory import Trajectory, VersionSpan, decoded, encoded


@dataclass(frozen=True)
class RolloutRequest:
    """`samples` trajectories of one task. `privileged_answer`: what the teacher's prompt discloses."""

    group_id: str
    task: Task
    samples: int
    privileged_answer: str


@dataclass(frozen=True, eq=False)
class Unfinished:
    """A trajectory that is not over: its finished turns, and what there is of the next one.

    trajectory:      with the turns that are finished, without routed experts.
    tokens, log_probs, versions:  of the unfinished turn, as in `trajectory.Turn`.
    routed_experts:  of the first tokens of prompt and continuation, int16 [n, MoE layers, top-k]; None: not asked for.
    """

    trajectory: Trajectory
    tokens: tuple[int, ...] = ()
    log_probs: tuple[float, ...] = ()
    versions: tuple[VersionSpan, ...] = ()
    routed_experts: np.ndarray | None = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Unfinished) and self.to_json() == other.to_json()

    @property
    def trajectory_id(self) -> str:
        return self.trajectory.trajectory_id

    @property
    def generated(self) -> int:
        return self.trajectory.generated + len(self.tokens)

    @property
    def spans(self) -> list[VersionSpan]:
        return [*spans_of(self.trajectory), *self.versions]

    def to_json(self) -> dict[str, Any]:
        experts = None if self.routed_experts is None else encoded(self.routed_experts)
        return {"trajectory": self.trajectory.to_json(), "tokens": list(self.tokens),
                "log_probs": list(self.log_probs), "versions": [asdict(span) for span in self.versions],
                "routed_experts": experts}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Unfinished:
        """Inverse of `to_json`; an unknown or missing key is an error (TypeError or KeyError), never dropped."""
        data = dict(data)
        experts = data.pop("routed_experts")
        return cls(
            trajectory=Trajectory.from_json(data.pop("trajectory")),
            tokens=tuple(data.pop("tokens")), log_probs=tuple(data.pop("log_probs")),
            versions=tuple(VersionSpan(**span) for span in data.pop("versions")),
            routed_experts=None if experts is None else decoded(experts), **data)


Member = Trajectory | Unfinished


@dataclass(frozen=True)
class Started:
    """A group that was asked for and is not trained on yet: all its members, finished or not, in order of sample."""

    request: RolloutRequest
    members: tuple[Member, ...]

    @property
    def group_id(self) -> str:
        return self.request.group_id

    @property
    def finished(self) -> list[Trajectory]:
        return [member for member in self.members if isinstance(member, Trajectory)]

    @property
    def unfinished(self) -> list[Unfinished]:
        return [member for member in self.members if isinstance(member, Unfinished)]

    @property
    def complete(self) -> bool:
        return not self.unfinished

    @property
    def generated(self) -> int:
        return sum(member.generated for member in self.members)

    @property
    def oldest(self) -> int | None:
        """The oldest weights that generated any of it; None if nothing has been generated."""
        versions = [version for member in self.members if (version := oldest(member)) is not None]
        return min(versions, default=None)

    def with_members(self, members: Iterable[Member]) -> Started:
        return replace(self, members=tuple(members))

    def to_json(self) -> dict[str, Any]:
        return {"request": asdict(self.request),
                "members": [{"finished" if isinstance(member, Trajectory) else "unfinished": member.to_json()}
                            for member in self.members]}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Started:
        """Inverse of `to_json`, as strict as `Trajectory.from_json`."""
        kinds = {"finished": Trajectory.from_json, "unfinished": Unfinished.from_json}
        request = dict(data["request"])
        task = dict(request.pop("task"))
        for key in ("answers", "gold_passages"):
            task[key] = tuple(task[key])
        members = [kinds[kind](member) for entry in data["members"] for kind, member in entry.items()]
        return cls(RolloutRequest(task=Task(**task), **request), tuple(members))


def spans_of(trajectory: Trajectory) -> list[VersionSpan]:
    return [span for turn in trajectory.turns for span in turn.versions]


def oldest(member: Member) -> int | None:
    """The oldest weights that generated a token of it; None if there is no token."""
    spans = spans_of(member) if isinstance(member, Trajectory) else member.spans
    return min((span.version for span in spans if span.end > span.start), default=None)

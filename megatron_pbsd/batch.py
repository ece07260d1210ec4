"""The declared batch schema: what travels from credit assignment to the learner, and nothing else.

A batch is ragged: one array per sequence and field. Padding, packing and sharding are the learner's. A field
that the schema does not know is an error everywhere (construction, split, transport), never dropped.

All token fields are aligned with the token they describe: `loss_mask[t]`, `advantages[t]`, `old_log_probs[t]`
speak of `tokens[t]` given `tokens[:t]`. The one shift to next-token prediction happens in `learner/microbatch.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_pbsd.errors import did_you_mean
from megatron_pbsd.trajectory import NOT_ROUTED, Trajectory

Granularity = Literal["token", "turn", "trajectory"]


@dataclass(frozen=True)
class Field:
    """dtype: numpy name. fill: value of padding. context_parallel: how a CP rank gets its part.
    extra_dims: dimensions after the first, equal for all sequences of a batch."""

    name: str
    dtype: str
    granularity: Granularity
    fill: float
    context_parallel: Literal["zigzag", "replicate"]
    meaning: str
    extra_dims: int = 0


SCHEMA: dict[str, Field] = {
    f.name: f
    for f in (
        Field("tokens", "int64", "token", 0, "zigzag", "token ids, prompt first"),
        Field("loss_mask", "float32", "token", 0, "zigzag", "1 where the policy generated the token"),
        Field("turn_index", "int64", "token", -1, "zigzag", "turn of a generated token, -1 elsewhere"),
        Field("answer_mask", "float32", "token", 0, "zigzag", "1 inside the final answer's text"),
        Field("stale", "float32", "token", 0, "zigzag", "1 where older weights than those that train generated it"),
        Field("rollout_log_probs", "float32", "token", 0, "zigzag", "engine's log-prob when sampled (nats)"),
        Field("old_log_probs", "float32", "token", 0, "zigzag", "learner's log-prob before the update (nats)"),
        Field("reference_log_probs", "float32", "token", 0, "zigzag", "log-prob under the frozen reference (nats)"),
        Field("teacher_log_probs", "float32", "token", 0, "zigzag", "same token, privileged prompt (nats)"),
        Field("teacher_top_tokens", "int64", "token", 0, "zigzag", "the teacher's likeliest tokens here, [K]", 1),
        Field("teacher_top_log_probs", "float32", "token", 0, "zigzag", "their log-probs (nats), [K]", 1),
        Field("advantages", "float32", "token", 0, "zigzag", "credit of a generated token"),
        Field("values", "float32", "token", 0, "zigzag", "value head's estimate before the token, before the update"),
        Field("returns", "float32", "token", 0, "zigzag", "what the value head should have estimated"),
        Field("routed_experts", "int16", "token", NOT_ROUTED, "zigzag",
              "experts that read this token, [MoE layers, top-k]; -1 prescribes none", 2),
        Field("group", "int64", "trajectory", 0, "replicate", "which prompt group the trajectory belongs to"),
        Field("reward", "float32", "trajectory", 0, "replicate", "outcome reward"),
    )
}


class SchemaError(ValueError):
    """A batch does not fit the declared schema."""


class Batch(Mapping[str, list[np.ndarray]]):
    """Ragged columns: `batch[name][i]` is the array of sequence `i`.

    Token fields have shape [T_i, …] (T_i = length of `tokens[i]`), turn fields [K_i], trajectory fields [].
    """

    def __init__(self, columns: Mapping[str, Sequence[np.ndarray]]):
        if "tokens" not in columns:
            raise SchemaError("a batch needs the field 'tokens'")
        self._columns = {name: self._checked(name, values) for name, values in columns.items()}
        lengths = self.lengths
        for name, values in self._columns.items():
            if len(values) != len(lengths):
                raise SchemaError(f"field {name!r} has {len(values)} sequences, 'tokens' has {len(lengths)}")
            if SCHEMA[name].granularity == "token":
                for i, (value, length) in enumerate(zip(values, lengths, strict=True)):
                    extra = values[0].shape[1:]
                    if value.shape != (length, *extra) or len(extra) != SCHEMA[name].extra_dims:
                        expected = ", ".join([str(length), *(["n"] * SCHEMA[name].extra_dims)])
                        raise SchemaError(
                            f"field {name!r} of sequence {i} has shape {value.shape}, expected ({expected})")

    @staticmethod
    def _checked(name: str, values: Sequence[np.ndarray]) -> list[np.ndarray]:
        if name not in SCHEMA:
            raise SchemaError(f"unknown batch field {name!r}{did_you_mean(name, SCHEMA)}")
        return [np.asarray(v, dtype=SCHEMA[name].dtype) for v in values]

    def __getitem__(self, name: str) -> list[np.ndarray]:
        return self._columns[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)

    @property
    def size(self) -> int:
        """Number of sequences."""
        return len(self._columns["tokens"])

    @property
    def lengths(self) -> list[int]:
        """T_i, tokens of each sequence."""
        return [len(t) for t in self._columns["tokens"]]

    def with_fields(self, **columns: Sequence[np.ndarray]) -> Batch:
        """The same sequences with these fields added or replaced. SchemaError as for a new batch."""
        return Batch({**self._columns, **columns})

    def select(self, indices: Sequence[int]) -> Batch:
        """These sequences, in this order."""
        return Batch({name: [values[i] for i in indices] for name, values in self._columns.items()})


def from_trajectories(trajectories: Sequence[Trajectory], privileged: bool = False) -> Batch:
    """Lay trajectories out as sequences; `privileged` puts the teacher's prompt before the same continuation.

    The experts of a continuation are the student's in both layouts; none are prescribed for the teacher's prompt.
    SchemaError when some trajectories know their experts and others do not.
    """
    columns: dict[str, list[np.ndarray]] = {
        name: [] for name in ("tokens", "loss_mask", "turn_index", "answer_mask", "rollout_log_probs")
    }
    for trajectory in trajectories:
        prompt = trajectory.privileged_prompt if privileged else trajectory.prompt
        total = len(prompt) + len(trajectory.continuation)
        row = {name: np.full(total, SCHEMA[name].fill, SCHEMA[name].dtype) for name in columns}
        row["tokens"][:] = (*prompt, *trajectory.continuation)
        start = len(prompt)
        for k, turn in enumerate(trajectory.turns):
            end = start + len(turn.tokens)
            row["loss_mask"][start:end] = 1
            row["turn_index"][start:end] = k
            row["rollout_log_probs"][start:end] = turn.log_probs
            if turn.answer_span is not None:
                a, b = turn.answer_span
                row["answer_mask"][start + a : start + b] = 1
            start = end + len(turn.observation)
        for name, values in columns.items():
            values.append(row[name])
    experts = _routed_experts(trajectories, privileged)
    return Batch({**columns, "routed_experts": experts} if experts else columns)


def _routed_experts(trajectories: Sequence[Trajectory], privileged: bool) -> list[np.ndarray]:
    known = [t for t in trajectories if t.routed_experts is not None]
    if known and len(known) < len(trajectories):
        without = [t.trajectory_id for t in trajectories if t.routed_experts is None]
        raise SchemaError(f"{len(without)} of {len(trajectories)} trajectories have no routed experts: {without[:3]}")
    if not privileged:
        return [t.routed_experts for t in known]
    return [
        np.pad(t.routed_experts[len(t.prompt) :], ((len(t.privileged_prompt), 0), (0, 0), (0, 0)),
               constant_values=NOT_ROUTED)
        for t in known]

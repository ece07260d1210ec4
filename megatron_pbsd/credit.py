"""From scored trajectories and two log-prob passes to the batch the learner trains on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice

import numpy as np

from megatron_pbsd.algorithms import Algorithm, Outcome
from megatron_pbsd.batch import Batch, from_trajectories
from megatron_pbsd.trajectory import Group, Trajectory, trajectories_of

LogProbs = Callable[[Batch], list[np.ndarray]]


def score(algorithm: Algorithm, trajectories: Sequence[Trajectory],
          log_probs: LogProbs) -> tuple[Batch, list[np.ndarray] | None]:
    """Old log-probs of the student and, if the algorithm needs them, the teacher's, by the learner.

    Both are one call to `log_probs` (float32 [T_i] per sequence). The teacher reads the privileged prompt and then the
    same continuation, so its generated tokens correspond one to one.

    Returns the training batch with `old_log_probs` and `reward`, and the teacher's log-probs of generated tokens.
    """
    batch = from_trajectories(trajectories)
    passes = [batch, from_trajectories(trajectories, privileged=True)] if algorithm.needs_teacher else [batch]
    masks = [mask for one in passes for mask in one["loss_mask"]]
    scores = log_probs(Batch({"tokens": [t for one in passes for t in one["tokens"]], "loss_mask": masks}))
    teacher = [s[mask > 0] for mask, s in zip(masks[batch.size :], scores[batch.size :], strict=True)]
    batch = batch.with_fields(old_log_probs=scores[: batch.size], reward=[np.float32(t.reward) for t in trajectories])
    return batch, teacher or None


def assign(algorithm: Algorithm, groups: Sequence[Group], batch: Batch,
           teacher: list[np.ndarray] | None) -> tuple[list[Group], Batch, dict[str, float]]:
    """Credit every generated token; trajectories come back with what was found about each of their turns."""
    trajectories = trajectories_of(groups)
    generated = [mask > 0 for mask in batch["loss_mask"]]
    outcomes = [
        Outcome(
            group_id=trajectory.group_id,
            reward=float(trajectory.reward),
            turn_index=batch["turn_index"][i][generated[i]],
            answer_mask=batch["answer_mask"][i][generated[i]] > 0,
            student=batch["old_log_probs"][i][generated[i]],
            teacher=None if teacher is None else teacher[i],
        )
        for i, trajectory in enumerate(trajectories)
    ]
    credit = algorithm.assign(outcomes)
    advantages = []
    for mask, values in zip(generated, credit.advantages, strict=True):
        row = np.zeros(len(mask), np.float32)
        row[mask] = values
        advantages.append(row)
    annotated = iter([
        replace(
            trajectory,
            evidence=None if credit.evidence is None else tuple(map(float, credit.evidence[i])),
            turn_advantages=tuple(_turn_means(outcomes[i], credit.advantages[i])),
        )
        for i, trajectory in enumerate(trajectories)
    ])
    groups = [replace(group, trajectories=tuple(islice(annotated, len(group.trajectories)))) for group in groups]
    return groups, batch.with_fields(advantages=advantages), credit.metrics


def _turn_means(outcome: Outcome, advantages: np.ndarray) -> list[float]:
    tokens = np.maximum(np.bincount(outcome.turn_index, minlength=outcome.turns), 1)
    return (np.bincount(outcome.turn_index, weights=advantages, minlength=outcome.turns) / tokens).tolist()

"""From scored trajectories to the batch the learner trains on, with as few forward passes as that takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Protocol

import numpy as np

from megatron_pbsd import losses
from megatron_pbsd.algorithms import Algorithm, Credit, Outcome, build_algorithm
from megatron_pbsd.batch import Batch, from_trajectories
from megatron_pbsd.config import CustomLossConfig, LearnerConfig, PrivilegedConfig, RunConfig
from megatron_pbsd.errors import UsageError
from megatron_pbsd.learner.update import Update
from megatron_pbsd.losses import Loss
from megatron_pbsd.trajectory import Group, Trajectory, trajectories_of

SOURCES = {
    "old_log_probs": ("student", "log_probs"),
    "values": ("student", "values"),
    "teacher_log_probs": ("teacher", "log_probs"),
    "teacher_top_tokens": ("teacher", "top_tokens"),
    "teacher_top_log_probs": ("teacher", "top_log_probs"),
    "reference_log_probs": ("reference", "log_probs"),
}
"""Batch field → whose forward pass it comes from, and which of its outputs it is."""

NEEDED = {"student": "old_log_probs", "teacher": "teacher_log_probs", "reference": "reference_log_probs",
          "values": "values"}
"""What an algorithm `needs` of an outcome → the batch field that holds it."""

READ = ("tokens", "loss_mask", "routed_experts")
"""What a forward pass reads of a batch, as far as the batch has it."""


class Scorer(Protocol):
    """The learner (`LearnerGroup`)."""

    def score(self, batch: Batch, outputs: Sequence[str], top: int) -> Mapping[str, list[np.ndarray]]: ...


class Reference(Protocol):
    """The model that the run started from: an engine (`EngineGroup` of one) that nothing is published to."""

    def score(self, sequences: Sequence[Sequence[int]]) -> Sequence[list[np.ndarray]]: ...


@dataclass(frozen=True)
class Plan:
    """What a step computes before its update, and what the update minimises.

    algorithm: None if the loss reads no credit.
    loss:      None is the learner's own, for data that may be of any policy.
    fields:    batch fields that forward passes before the update fill.
    deferred:  the algorithm only begins; the loss ends what it does with the log-probs of the update itself.
    top:       how many of the teacher's likeliest tokens are asked for.
    fresh:     the weights whose tokens alone are trained on; None trains on all.
    """

    algorithm: Algorithm | None
    loss: Loss | None
    fields: tuple[str, ...]
    deferred: bool = False
    top: int = 0
    fresh: int | None = None

    @property
    def passes(self) -> dict[str, tuple[str, ...]]:
        """Whose forward passes are made, and the outputs that are asked of each; empty when the update's is enough."""
        wanted: dict[str, tuple[str, ...]] = {}
        for model, output in (SOURCES[name] for name in self.fields):
            wanted[model] = (*wanted.get(model, ()), output)
        return wanted


def is_on_policy(trajectories: Sequence[Trajectory], version: int, config: LearnerConfig) -> bool:
    """Whether the update's forward pass has the log-probs under the policy that sampled: the weights of `version`, to
    be updated once, sampled every token. The trajectories' own records decide, not how they are thought to be made."""
    return (config.recompute_log_probs == "auto" and config.updates_per_step == 1
            and all(span.version == version for t in trajectories for turn in t.turns for span in turn.versions))


def plan_for(config: RunConfig, groups: Sequence[Group], version: int) -> Plan:
    """The plan of a step that trains weights `version` on these groups."""
    on_policy = is_on_policy(trajectories_of(groups), version, config.learner)
    masks = config.rollout.stale_tokens == "mask" and not on_policy
    return replace(plan_of(config, on_policy), fresh=version if masks else None)


def plan_of(config: RunConfig, on_policy: bool) -> Plan:
    """The plan of a step on exactly on-policy data, or on any."""
    top = config.algorithm.teacher_top if isinstance(config.algorithm, PrivilegedConfig) else 0
    return plan(build_algorithm(config.algorithm), loss_of(config, on_policy), on_policy, top)


def loss_of(config: RunConfig, on_policy: bool) -> Loss:
    """What an update minimises. On exactly on-policy data the loss may end what the algorithm began.

    UsageError when it cannot correct for stale tokens as configured.
    """
    rollout, section = config.rollout, config.algorithm if on_policy else config.algorithm.loss
    longest = min(rollout.max_turns * rollout.max_turn_tokens, rollout.max_context)
    loss = losses.build(section, on_policy, longest, mask_stale=rollout.stale_tokens == "mask" and not on_policy)
    correcting = rollout.max_staleness > 0 and rollout.stale_tokens == "correct"
    if correcting and isinstance(section, CustomLossConfig) and "rollout_log_probs" not in loss.fields:
        raise UsageError(f"rollout.stale_tokens = 'correct' corrects nothing with loss {loss.name!r}, which does not "
                         "read 'rollout_log_probs': set stale_tokens to 'mask', or declare the field and weigh by it")
    return loss


def plan(algorithm: Algorithm, loss: Loss, on_policy: bool, top: int = 0) -> Plan:
    """The passes that `algorithm` and `loss` need between them. `loss` is the one for exactly on-policy data or not.

    UsageError when the loss reads what the algorithm does not provide.
    """
    if "returns" in loss.fields and "values" not in algorithm.needs:
        raise UsageError(f"loss {loss.name!r} trains a value head, which {type(algorithm).__name__} has no returns "
                         "for: set algorithm.loss.value to null, or algorithm.name to 'ppo'")
    candidates = "teacher_top_tokens" in loss.fields
    if candidates and not top:
        raise UsageError(f"loss {loss.name!r} compares with the teacher's likeliest tokens, and "
                         f"{type(algorithm).__name__} has no teacher: set algorithm.name to 'distill'")
    credited = not {"advantages", "returns"}.isdisjoint(loss.fields)
    deferred = credited and on_policy and algorithm.ends_in_loss
    needs = algorithm.needs - {"student"} if deferred else algorithm.needs if credited else ()
    wanted = {*loss.fields, *(NEEDED[need] for need in needs)}
    return Plan(algorithm if credited else None, loss if on_policy else None,
                tuple(name for name in SOURCES if name in wanted), deferred, top if candidates else 0)


def prepare(plan: Plan, groups: Sequence[Group], learner: Scorer,
            reference: Reference | None) -> tuple[Batch, Credit | None]:
    """The batch that the update reads, and the credit in it."""
    trajectories = trajectories_of(groups)
    batch = from_trajectories(trajectories).with_fields(
        reward=[np.float32(t.reward) for t in trajectories],
        group=[np.int64(i) for i, group in enumerate(groups) for _ in group.trajectories])
    if plan.fresh is not None:
        batch = batch.with_fields(stale=on_generated(batch, [older(t, plan.fresh) for t in trajectories]))
    batch = scored(batch, plan, trajectories, learner, reference)
    if plan.algorithm is None:
        return batch, None
    found = outcomes(trajectories, batch)
    credit = plan.algorithm.begin(found) if plan.deferred else plan.algorithm.assign(found)
    columns = {"advantages": credit.advantages} | ({"returns": credit.returns} if credit.returns is not None else {})
    return batch.with_fields(**{name: on_generated(batch, values) for name, values in columns.items()}), credit


def scored(batch: Batch, plan: Plan, trajectories: Sequence[Trajectory], learner: Scorer,
           reference: Reference | None) -> Batch:
    """`batch` with the plan's fields. What the learner computes of student and teacher is one call.

    The teacher reads the privileged prompt and then the same continuation, so its generated tokens correspond one to
    one to the student's, to which all fields are aligned.
    """
    passes = plan.passes
    sequences = {"student": batch, "teacher": from_trajectories(trajectories, privileged=True)}
    asked = [model for model in sequences if model in passes]
    results: dict[str, dict[str, list[np.ndarray]]] = {}
    if asked:
        joined = Batch({name: [row for model in asked for row in sequences[model][name]]
                        for name in READ if name in batch})
        wanted = list(dict.fromkeys(output for model in asked for output in passes[model]))
        outputs = learner.score(joined, wanted, plan.top)
        results = {model: {name: rows[i * batch.size : (i + 1) * batch.size] for name, rows in outputs.items()}
                   for i, model in enumerate(asked)}
    if "reference" in passes:
        (log_probs,) = reference.score([tokens.tolist() for tokens in batch["tokens"]])
        sequences["reference"], results["reference"] = batch, {"log_probs": log_probs}
    return batch.with_fields(**{
        name: on_generated(batch, [row[mask > 0] for mask, row in zip(
            sequences[model]["loss_mask"], results[model][output], strict=True)])
        for name, (model, output) in SOURCES.items() if name in plan.fields})


def older(trajectory: Trajectory, version: int) -> np.ndarray:
    """float32 [n], by generated token: 1 where weights before `version` generated it."""
    spans = [span for turn in trajectory.turns for span in turn.versions]
    return np.repeat([np.float32(span.version < version) for span in spans],
                     [span.end - span.start for span in spans]).astype(np.float32)


def on_generated(batch: Batch, values: Sequence[np.ndarray]) -> list[np.ndarray]:
    """[n, …] of each trajectory's generated tokens → [T, …] of its sequence, 0 elsewhere."""
    rows = []
    for mask, value in zip(batch["loss_mask"], values, strict=True):
        row = np.zeros((len(mask), *value.shape[1:]), value.dtype)
        row[mask > 0] = value
        rows.append(row)
    return rows


def outcomes(trajectories: Sequence[Trajectory], batch: Batch) -> list[Outcome]:
    """The trajectories as an algorithm sees them, with what the batch has of its `needs`."""
    known = {need: field for need, field in NEEDED.items() if field in batch}
    return [
        Outcome(
            group_id=trajectory.group_id,
            reward=float(trajectory.reward),
            turn_index=batch["turn_index"][i][generated],
            answer_mask=batch["answer_mask"][i][generated] > 0,
            **{need: batch[field][i][generated] for need, field in known.items()},
        )
        for i, trajectory in enumerate(trajectories)
        for generated in [batch["loss_mask"][i] > 0]
    ]


def conclude(plan: Plan, groups: Sequence[Group], batch: Batch, credit: Credit | None,
             updates: Sequence[Update]) -> tuple[list[Group], dict[str, float]]:
    """The groups with what was found about each of their turns, and the algorithm's metrics."""
    metrics = {"log_probs/sequences": float(len(plan.passes) * batch.size)}
    if credit is None:
        return list(groups), metrics
    trajectories = trajectories_of(groups)
    if plan.deferred:
        # Exactly on-policy data are of one update, which saw the whole batch in its order.
        (update,) = updates
        batch = batch.with_fields(old_log_probs=update.log_probs)
        credit = plan.algorithm.assign(outcomes(trajectories, batch))
    found = outcomes(trajectories, batch)
    annotated = iter([
        replace(
            trajectory,
            evidence=None if credit.evidence is None else tuple(map(float, credit.evidence[i])),
            turn_advantages=tuple(turn_means(found[i], credit.advantages[i])),
        )
        for i, trajectory in enumerate(trajectories)
    ])
    groups = [replace(group, trajectories=tuple(islice(annotated, len(group.trajectories)))) for group in groups]
    return groups, credit.metrics | metrics


def turn_means(outcome: Outcome, advantages: np.ndarray) -> list[float]:
    """Mean of `advantages`, [n] by generated token, over each turn; 0 for a turn without tokens."""
    tokens = np.maximum(np.bincount(outcome.turn_index, minlength=outcome.turns), 1)
    return (np.bincount(outcome.turn_index, weights=advantages, minlength=outcome.turns) / tokens).tolist()

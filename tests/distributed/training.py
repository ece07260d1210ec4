"""What the tests of the learner run on every rank: a batch, a few steps of each loss, and the weights they lead to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from megatron_pbsd import losses
from megatron_pbsd.batch import Batch
from megatron_pbsd.config import (
    LearnerConfig,
    ModelConfig,
    OptimizerConfig,
    PBSDConfig,
    PolicyLossConfig,
    SequenceTISConfig,
    SFTConfig,
    TokenTISConfig,
)
from megatron_pbsd.resharding.manifest import WeightsManifest
from megatron_pbsd.resharding.shared_memory import attach
from megatron_pbsd.resharding.stream import Buckets, plan_for

if TYPE_CHECKING:
    from megatron_pbsd.learner.learner import Learner

# A large epsilon makes the first Adam step a smooth function of the gradient instead of its sign.
OPTIMIZER = OptimizerConfig(lr=1e-2, eps=1e-2, clip_grad=0.5, weight_decay=0.1, warmup_steps=1, decay_style="linear")
STEPS = 2
BUDGET = 48
POLICY = PolicyLossConfig(kl_coefficient=0.3, entropy_coefficient=0.05, clip_low=0.1, clip_high=0.1,
                          mismatch=TokenTISConfig(cap=1.2))
LOSSES = {
    "sft": SFTConfig(),
    "grpo": POLICY,
    "gspo": PolicyLossConfig(ratio="sequence", reduction="trajectory", clip_low=0.2, clip_high=0.2,
                             mismatch=SequenceTISConfig(cap=1.1)),
    "pbsd": PBSDConfig(snr_gate=0.1, loss=PolicyLossConfig(reduction="turn")),
}
"""name → what `losses.build` takes."""


def make_batch(seed: int = 0, sequences: int = 7, vocabulary: int = 64) -> Batch:
    """Prompts followed by turns and observations of random lengths, with every field that some loss reads."""
    rng = np.random.default_rng(seed)
    tokens = [rng.integers(0, vocabulary, n) for n in rng.integers(2, 24, sequences)]
    turns = [_turns(rng, len(t)) for t in tokens]
    columns = {
        "turn_index": turns,
        "loss_mask": [(turn >= 0).astype(np.float32) for turn in turns],
        "answer_mask": [((turn == turn.max()) & (turn > 0)).astype(np.float32) for turn in turns],
        "advantages": [np.full(len(t), rng.normal()) for t in tokens],
        "old_log_probs": [-4 + 0.5 * rng.normal(size=len(t)) for t in tokens],
        "teacher_log_probs": [-4 + 0.5 * rng.normal(size=len(t)) for t in tokens],
        "group": [np.int64(i // 3) for i in range(sequences)],
    }
    columns["values"] = [0.3 * rng.normal(size=len(t)) for t in tokens]
    columns["returns"] = [values + 0.3 * rng.normal(size=len(values)) for values in columns["values"]]
    columns["teacher_top_tokens"] = [np.argsort(rng.random((len(t), vocabulary)), -1)[:, :5] for t in tokens]
    columns["teacher_top_log_probs"] = [
        np.log(0.9 * p / p.sum(-1, keepdims=True)) for t in tokens for p in [rng.random((len(t), 5))]]
    columns["rollout_log_probs"] = [o + 0.2 * rng.normal(size=len(o)) for o in columns["old_log_probs"]]
    return Batch({"tokens": tokens, **columns})


def _turns(rng: np.random.Generator, length: int) -> np.ndarray:
    """-1 in the prompt and in observations, else the number of the turn."""
    turns = np.full(length, -1)
    start, turn = int(rng.integers(1, 5)), 0
    while start < length:
        stop = start + int(rng.integers(1, 8))
        turns[start:stop] = turn
        start, turn = stop + int(rng.integers(0, 4)), turn + 1
    return turns


@contextmanager
def learner_of(rank, rendezvous, folder, settings: LearnerConfig, loss=LOSSES["sft"], initial="load"
               ) -> Iterator[Learner]:
    """A rank of a learner, closed in the end. `loss`: what `losses.build` takes."""
    from megatron_pbsd.learner.learner import Learner

    learner = Learner(rank, rendezvous, ModelConfig(path=str(folder), initial_weights=initial), settings,
                      losses.build(loss), seed=3, total_steps=10)
    try:
        yield learner
    finally:
        learner.close()


def train(rank, rendezvous, folder, settings: LearnerConfig, loss, initial="load", sequences=7):
    """Log-probs before, metrics of each step, weights before and after."""
    with learner_of(rank, rendezvous, folder, settings, loss, initial) as learner:
        batch = make_batch(sequences=sequences)
        everywhere = learner.log_probs(Batch({"tokens": batch["tokens"]}))
        masked = learner.log_probs(batch)
        before = published(learner, rank)
        updates = [learner.step(batch) for _ in range(STEPS)]
        return {"log_probs": everywhere, "masked": masked, "before": before, "after": published(learner, rank),
                "metrics": [update.metrics for update in updates], "first": updates[0].log_probs}


def published(learner, rank):
    """All weights as the ranks together write them into one segment."""
    import torch.distributed as dist

    with shared_bucket(learner, rank) as manifest:
        learner.gather(0)
        dist.barrier()
        differing = learner.differing(manifest)
        assert differing == [], differing
        dist.barrier()
        if rank != 0:
            return None
        return {name: tensor.clone().float().numpy() for name, tensor in attach(manifest).items()}


@contextmanager
def shared_bucket(learner, rank) -> Iterator[WeightsManifest]:
    """All tensors as one bucket in shared memory, which the learner is prepared for."""
    import torch.distributed as dist

    plan = plan_for(learner._state._decoder, learner.config.parallel, learner.tensors(), None)
    owner = Buckets(plan) if rank == 0 else None
    made = [owner.buckets if owner else None]
    dist.broadcast_object_list(made)
    learner.prepare(made[0])
    try:
        yield made[0][0].manifest
    finally:
        if owner:
            owner.close()


def assert_same_run(results, expected, rtol=1e-5, atol=2e-6):
    """`results`: of each rank. Metrics, log-probs and weights are those of `expected`, which one rank computed."""
    for result in results:
        for found, wanted in zip(result["metrics"], expected["metrics"], strict=True):
            for name in wanted:
                np.testing.assert_allclose(found[name], wanted[name], rtol=rtol, atol=1e-7, err_msg=name)
            assert found.keys() == wanted.keys()
    for kind in ("log_probs", "masked", "first"):
        for found, wanted in zip(results[0][kind], expected[kind], strict=True):
            np.testing.assert_allclose(found, wanted, rtol=rtol, atol=atol, err_msg=kind)
    for name, wanted in expected["after"].items():
        np.testing.assert_allclose(results[0]["after"][name], wanted, rtol=rtol, atol=atol, err_msg=name)

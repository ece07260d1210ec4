"""Every layout computes what one rank computes, and one rank computes what transformers and plain torch compute."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megatron_pbsd import losses
from megatron_pbsd.batch import Batch
from megatron_pbsd.config import (
    LearnerConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PolicyLossConfig,
    SFTConfig,
    TokenTISConfig,
)
from megatron_pbsd.platform.cpu import Cpu
from megatron_pbsd.resharding.manifest import layout
from megatron_pbsd.resharding.shared_memory import Segment, attach

LAYOUTS = {
    "one": ParallelConfig(world_size=1, tp=1, pp=1),
    "tp2": ParallelConfig(world_size=2, tp=2, pp=1),
    "pp2": ParallelConfig(world_size=2, tp=1, pp=2),
    "dp2": ParallelConfig(world_size=2, tp=1, pp=1),
    "tp2pp2": ParallelConfig(world_size=4, tp=2, pp=2),
    "pp2dp2": ParallelConfig(world_size=4, tp=1, pp=2),
}
# A large epsilon makes the first Adam step a smooth function of the gradient instead of its sign.
OPTIMIZER = OptimizerConfig(lr=1e-2, eps=1e-2, clip_grad=0.5, weight_decay=0.1, warmup_steps=1, decay_style="linear")
LOSSES = {
    "sft": SFTConfig(),
    "policy": PolicyLossConfig(kl_coefficient=0.3, entropy_coefficient=0.05, clip_low=0.1, clip_high=0.1,
                               mismatch=TokenTISConfig(cap=1.2)),
}


class SequenceParallelCpu(Cpu):
    def transformer_flags(self, tensor_parallel_size):
        return super().transformer_flags(tensor_parallel_size) | {"sequence_parallel": tensor_parallel_size > 1}


def make_batch(seed: int = 0, sequences: int = 7) -> Batch:
    rng = np.random.default_rng(seed)
    tokens = [rng.integers(0, 64, n) for n in rng.integers(2, 24, sequences)]
    columns = {
        "loss_mask": [(rng.random(len(t)) < 0.6).astype(np.float32) for t in tokens],
        "advantages": [rng.normal(size=len(t)) for t in tokens],
        "old_log_probs": [-4 + 0.5 * rng.normal(size=len(t)) for t in tokens],
    }
    columns["rollout_log_probs"] = [o + 0.2 * rng.normal(size=len(o)) for o in columns["old_log_probs"]]
    return Batch({"tokens": tokens, **columns})


def train(rank, rendezvous, folder, parallel, loss, platform=None, initial="load", sequences=7):
    """Log-probs before, metrics of each step, weights before and after."""
    from megatron_pbsd.learner.learner import Learner

    config = LearnerConfig(parallel=parallel, optimizer=OPTIMIZER, micro_batch_tokens=48)
    learner = Learner(rank, rendezvous, ModelConfig(path=str(folder), initial_weights=initial), config,
                      losses.build(loss), seed=3, total_steps=10, platform=platform)
    try:
        batch = make_batch(sequences=sequences)
        everywhere = learner.log_probs(Batch({"tokens": batch["tokens"]}))
        masked = learner.log_probs(batch)
        before = published(learner, rank)
        metrics = [learner.step(batch).metrics for _ in range(3)]
        return {"log_probs": everywhere, "masked": masked, "metrics": metrics, "before": before,
                "after": published(learner, rank)}
    finally:
        learner.close()


def published(learner, rank):
    """All weights as one rank after another wrote them into one segment."""
    import torch.distributed as dist

    segment = Segment(layout("", learner.tensors()).nbytes) if rank == 0 else None
    name = [segment.name if segment else None]
    dist.broadcast_object_list(name)
    manifest = layout(name[0], learner.tensors())
    learner.publish(manifest)
    dist.barrier()
    if rank != 0:
        return None
    tensors = {name: tensor.clone().numpy() for name, tensor in attach(manifest).items()}
    segment.close()
    return tensors


@pytest.fixture(scope="module")
def run(ranks, hf_folders):
    """(layout, tied, loss) → what each rank of that layout returns from `train`; each is run once."""
    made = {}

    def get(name, tied, loss):
        key = (name, tied, loss)
        if key not in made:
            parallel = LAYOUTS[name]
            made[key] = ranks.run(train, parallel.world_size, hf_folders[tied], parallel, LOSSES[loss])
        return made[key]

    return get


def assert_same_run(results, expected):
    for result in results:
        for found, wanted in zip(result["metrics"], expected["metrics"], strict=True):
            assert found == pytest.approx(wanted, rel=1e-5, abs=1e-7)
    for kind in ("log_probs", "masked"):
        for found, wanted in zip(results[0][kind], expected[kind], strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=2e-6)
    for name, wanted in expected["after"].items():
        np.testing.assert_allclose(results[0]["after"][name], wanted, rtol=1e-5, atol=2e-6, err_msg=name)


both = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
divided = pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "one"])


@both
@divided
def test_policy_training_equals_one_rank(run, name, tied):
    results = run(name, tied, "policy")
    assert_same_run(results, run("one", tied, "policy")[0])
    assert all(result["log_probs"] is None for result in results[1:])


@pytest.mark.parametrize("name", ["tp2", "pp2", "dp2"])
def test_sft_training_equals_one_rank(run, name):
    assert_same_run(run(name, True, "sft"), run("one", True, "sft")[0])


@both
@divided
def test_publication_is_bit_identical_to_the_file(run, hf_folders, name, tied):
    stored = load_file(hf_folders[tied] / "model.safetensors")
    published = run(name, tied, "policy")[0]["before"]
    assert set(published) == set(stored)
    for tensor, values in stored.items():
        np.testing.assert_array_equal(published[tensor], values.numpy())


@pytest.mark.parametrize("name", ["tp2", "tp2pp2"])
def test_sequence_parallel_equals_one_rank(ranks, hf_folders, run, name):
    parallel = LAYOUTS[name]
    results = ranks.run(train, parallel.world_size, hf_folders[True], parallel, LOSSES["policy"],
                        SequenceParallelCpu())
    assert_same_run(results, run("one", True, "policy")[0])


def test_fewer_sequences_than_data_parallel_ranks(ranks, hf_folders):
    found, alone = (
        ranks.run(train, p.world_size, hf_folders[True], p, LOSSES["policy"], None, "load", 1)
        for p in (LAYOUTS["dp2"], LAYOUTS["one"]))
    assert_same_run(found, alone[0])


@both
def test_log_probs_equal_transformers(hf_folders, run, tied):
    from transformers import Qwen3ForCausalLM

    model = Qwen3ForCausalLM.from_pretrained(hf_folders[tied])
    found, batch = run("one", tied, "policy")[0], make_batch()
    for i, tokens in enumerate(batch["tokens"]):
        with torch.no_grad():
            logits = model(torch.from_numpy(tokens)[None]).logits[0]
        expected = logits.log_softmax(-1)[torch.arange(len(tokens) - 1), torch.from_numpy(tokens[1:])].numpy()
        np.testing.assert_allclose(found["log_probs"][i][1:], expected, atol=1e-5)
        np.testing.assert_allclose(found["masked"][i][1:], expected * batch["loss_mask"][i][1:], atol=1e-5)
        assert found["log_probs"][i][0] == 0


@both
def test_training_equals_plain_torch(hf_folders, run, tied):
    """Three SFT steps by transformers' model and torch's AdamW."""
    from transformers import Qwen3ForCausalLM

    model, batch = Qwen3ForCausalLM.from_pretrained(hf_folders[tied]), make_batch()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim == 1]
    adam = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": OPTIMIZER.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        betas=(OPTIMIZER.beta1, OPTIMIZER.beta2), eps=OPTIMIZER.eps)
    for step, metrics in enumerate(run("one", tied, "sft")[0]["metrics"], start=1):
        total, count = torch.zeros(()), 0
        for tokens, mask in zip(batch["tokens"], batch["loss_mask"], strict=True):
            tokens, mask = torch.from_numpy(tokens), torch.from_numpy(mask)
            log_probs = model(tokens[None]).logits[0, :-1].log_softmax(-1)
            total = total - (log_probs[torch.arange(len(tokens) - 1), tokens[1:]] * mask[1:]).sum()
            count += int(mask[1:].sum())
        adam.zero_grad()
        (total / count).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.clip_grad)
        lr = OPTIMIZER.lr * (1 - (step - 1) / 9)
        for group in adam.param_groups:
            group["lr"] = lr
        adam.step()
        assert metrics["loss/total"] == pytest.approx(float(total.detach()) / count, rel=1e-5)
        assert metrics["grad_norm"] == pytest.approx(float(norm), rel=1e-5)
        assert metrics["lr"] == pytest.approx(lr)
        assert metrics["tokens"] == count
    for name, parameter in model.named_parameters():
        np.testing.assert_allclose(run("one", tied, "sft")[0]["after"][name], parameter.detach().numpy(),
                                   rtol=1e-4, atol=1e-5, err_msg=name)


def test_random_weights_do_not_depend_on_the_layout(ranks, hf_folders):
    made = [ranks.run(train, p.world_size, hf_folders[True], p, LOSSES["sft"], None, "random")[0]["before"]
            for p in (LAYOUTS["one"], LAYOUTS["tp2pp2"])]
    for name, values in made[0].items():
        np.testing.assert_array_equal(made[1][name], values)
        assert values.std() == pytest.approx(0.1, rel=0.15) if values.ndim == 2 else (values == 1).all()


def test_a_missing_field_is_named(ranks, hf_folders):
    with pytest.raises(AssertionError, match="needs the batch fields .*advantages"):
        ranks.run(step_without_advantages, 1, hf_folders[True])


def step_without_advantages(rank, rendezvous, folder):
    from megatron_pbsd.learner.learner import Learner

    learner = Learner(rank, rendezvous, ModelConfig(path=str(folder)), LearnerConfig(parallel=LAYOUTS["one"]),
                      losses.build(PolicyLossConfig()), seed=0, total_steps=1)
    try:
        batch = make_batch()
        learner.step(Batch({"tokens": batch["tokens"], "loss_mask": batch["loss_mask"]}))
    finally:
        learner.close()


def test_damage_to_published_weights_is_found_by_the_ranks_that_hold_them(ranks, hf_folders):
    parallel = LAYOUTS["tp2"]
    segment = Segment(1 << 20)
    try:
        results = ranks.run(find_damage, 2, hf_folders[True], parallel, segment.name)
    finally:
        segment.close()
    assert results == [([], ["model.norm.weight"]), ([], ["model.embed_tokens.weight", "model.norm.weight"])]


def find_damage(rank, rendezvous, folder, parallel, segment):
    import torch.distributed as dist

    from megatron_pbsd.learner.learner import Learner

    learner = Learner(rank, rendezvous, ModelConfig(path=str(folder)), LearnerConfig(parallel=parallel),
                      losses.build(SFTConfig()), seed=0, total_steps=1)
    try:
        manifest = layout(segment, learner.tensors())
        learner.publish(manifest)
        dist.barrier()
        intact = learner.differing(manifest)
        dist.barrier()
        if rank == 0:
            published = attach(manifest)
            published["model.norm.weight"][0] += 1
            published["model.embed_tokens.weight"][-1, -1] += 1
        dist.barrier()
        return intact, learner.differing(manifest)
    finally:
        learner.close()


@pytest.mark.parametrize("name", ["one", "tp2", "dp2"])
def test_the_first_update_after_scoring_has_ratio_one(ranks, hf_folders, name):
    parallel = LAYOUTS[name]
    metrics = ranks.run(on_policy_step, parallel.world_size, hf_folders[True], parallel)[0]
    for key, wanted in {"ratio_mean": 1, "ratio_max": 1, "kl_old": 0, "clip_fraction": 0, "kl_rollout": 0}.items():
        assert metrics[f"loss/{key}"] == pytest.approx(wanted, abs=1e-5)


def on_policy_step(rank, rendezvous, folder, parallel):
    import torch.distributed as dist

    from megatron_pbsd.learner.learner import Learner

    learner = Learner(rank, rendezvous, ModelConfig(path=str(folder)), LearnerConfig(parallel=parallel),
                      losses.build(PolicyLossConfig()), seed=0, total_steps=1)
    try:
        batch, scores = make_batch(), [None]
        scores[0] = learner.log_probs(batch)
        dist.broadcast_object_list(scores)
        return learner.step(batch.with_fields(old_log_probs=scores[0], rollout_log_probs=scores[0])).metrics
    finally:
        learner.close()

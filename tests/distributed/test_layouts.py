"""Every layout computes what one rank computes, and one rank computes what transformers and plain torch compute."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_pbsd import losses
from megatron_pbsd.batch import Batch
from megatron_pbsd.config import (
    LearnerConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PolicyLossConfig,
    SFTConfig,
)
from megatron_pbsd.platform.cpu import Cpu
from megatron_pbsd.resharding.manifest import layout
from megatron_pbsd.resharding.shared_memory import Segment, attach

ONE = ParallelConfig(world_size=1, tp=1, pp=1)
LAYOUTS = {
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
                               mismatch_cap=1.2),
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


def train(rank, rendezvous, folder, parallel, loss, platform=None, steps=3, initial="load"):
    """Log-probs before, metrics of each step, weights before and after."""
    from megatron_pbsd.learner.learner import Learner

    config = LearnerConfig(parallel=parallel, optimizer=OPTIMIZER, micro_batch_tokens=48)
    learner = Learner(rank, rendezvous, ModelConfig(path=str(folder), initial_weights=initial), config,
                      losses.build(loss), seed=3, total_steps=10, platform=platform)
    try:
        batch = make_batch()
        everywhere = learner.log_probs(Batch({"tokens": batch["tokens"]}))
        masked = learner.log_probs(batch)
        before = published(learner, rank)
        metrics = [learner.step(batch) for _ in range(steps)]
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
def one_rank(ranks, hf_folders):
    """(tied, loss name) → what one rank computes."""
    made = {}

    def get(tied, loss):
        if (tied, loss) not in made:
            made[tied, loss] = ranks.run(train, 1, hf_folders[tied], ONE, LOSSES[loss])[0]
        return made[tied, loss]

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


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_policy_training_equals_one_rank(ranks, hf_folders, one_rank, name, tied):
    parallel = LAYOUTS[name]
    results = ranks.run(train, parallel.world_size, hf_folders[tied], parallel, LOSSES["policy"])
    assert_same_run(results, one_rank(tied, "policy"))
    assert all(result["log_probs"] is None for result in results[1:])


@pytest.mark.parametrize("name", ["tp2", "pp2", "dp2"])
def test_sft_training_equals_one_rank(ranks, hf_folders, one_rank, name):
    parallel = LAYOUTS[name]
    results = ranks.run(train, parallel.world_size, hf_folders[True], parallel, LOSSES["sft"])
    assert_same_run(results, one_rank(True, "sft"))


@pytest.mark.parametrize("name", ["tp2", "tp2pp2"])
def test_sequence_parallel_equals_one_rank(ranks, hf_folders, one_rank, name):
    parallel = LAYOUTS[name]
    results = ranks.run(train, parallel.world_size, hf_folders[True], parallel, LOSSES["policy"],
                        SequenceParallelCpu())
    assert_same_run(results, one_rank(True, "policy"))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_log_probs_equal_transformers(hf_folders, one_rank, tied):
    from transformers import Qwen3ForCausalLM

    model = Qwen3ForCausalLM.from_pretrained(hf_folders[tied])
    run, batch = one_rank(tied, "policy"), make_batch()
    for i, tokens in enumerate(batch["tokens"]):
        with torch.no_grad():
            logits = model(torch.from_numpy(tokens)[None]).logits[0]
        expected = logits.log_softmax(-1)[torch.arange(len(tokens) - 1), torch.from_numpy(tokens[1:])].numpy()
        np.testing.assert_allclose(run["log_probs"][i][1:], expected, atol=1e-5)
        np.testing.assert_allclose(run["masked"][i][1:], expected * batch["loss_mask"][i][1:], atol=1e-5)
        assert run["log_probs"][i][0] == 0


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_training_equals_plain_torch(hf_folders, one_rank, tied):
    """Three SFT steps by transformers' model and torch's AdamW."""
    from transformers import Qwen3ForCausalLM

    model, batch = Qwen3ForCausalLM.from_pretrained(hf_folders[tied]), make_batch()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim == 1]
    adam = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": OPTIMIZER.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        betas=(OPTIMIZER.beta1, OPTIMIZER.beta2), eps=OPTIMIZER.eps)
    for step, metrics in enumerate(one_rank(tied, "sft")["metrics"], start=1):
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
        np.testing.assert_allclose(one_rank(tied, "sft")["after"][name], parameter.detach().numpy(),
                                   rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_publication_is_bit_identical_to_the_file(ranks, hf_folders, name, tied):
    from safetensors.torch import load_file

    parallel = LAYOUTS[name]
    result = ranks.run(train, parallel.world_size, hf_folders[tied], parallel, LOSSES["sft"], None, 0)[0]
    stored = load_file(hf_folders[tied] / "model.safetensors")
    assert set(result["before"]) == set(stored)
    for tensor, values in stored.items():
        np.testing.assert_array_equal(result["before"][tensor], values.numpy())


def test_random_weights_do_not_depend_on_the_layout(ranks, hf_folders):
    made = [ranks.run(train, p.world_size, hf_folders[True], p, LOSSES["sft"], None, 0, "random")[0]["before"]
            for p in (ONE, LAYOUTS["tp2pp2"])]
    for name, values in made[0].items():
        np.testing.assert_array_equal(made[1][name], values)
        assert values.std() == pytest.approx(0.1, rel=0.15) if values.ndim == 2 else (values == 1).all()


def test_a_missing_field_is_named(ranks, hf_folders):
    with pytest.raises(AssertionError, match="needs the batch fields .*advantages"):
        ranks.run(step_without_advantages, 1, hf_folders[True])


def step_without_advantages(rank, rendezvous, folder):
    from megatron_pbsd.learner.learner import Learner

    learner = Learner(rank, rendezvous, ModelConfig(path=str(folder)), LearnerConfig(parallel=ONE),
                      losses.build(PolicyLossConfig()), seed=0, total_steps=1)
    try:
        batch = make_batch()
        learner.step(Batch({"tokens": batch["tokens"], "loss_mask": batch["loss_mask"]}))
    finally:
        learner.close()

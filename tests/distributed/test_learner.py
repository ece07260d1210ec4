"""One rank computes what transformers and plain torch compute; options that must not change the result do not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors import safe_open

from megatron_pbsd.batch import Batch
from megatron_pbsd.config import LearnerConfig, MoEConfig, ParallelConfig, PolicyLossConfig
from megatron_pbsd.resharding.shared_memory import attach
from tests.distributed.layouts import DENSE, MOE, ONE
from tests.distributed.reference import next_token_log_probs, sft_loss, transformers_model
from tests.distributed.training import (
    BUDGET,
    LOSSES,
    OPTIMIZER,
    assert_same_run,
    learner_of,
    make_batch,
    shared_bucket,
    train,
)

SETTINGS = LearnerConfig(parallel=ONE, optimizer=OPTIMIZER, micro_batch_tokens=BUDGET)


@pytest.fixture(scope="module")
def run(ranks, folders):
    """What each rank returns from `train`; each combination is run once."""
    made = {}

    def get(model, loss="grpo", *, settings=SETTINGS, initial="load", sequences=7):
        key = (model, loss, settings, initial, sequences)
        if key not in made:
            made[key] = ranks.run(
                train, settings.parallel.world_size, folders[model], settings, LOSSES[loss], initial, sequences)
        return made[key]

    return get


def but(**changes) -> LearnerConfig:
    return SETTINGS.model_copy(update=changes)


each_model = pytest.mark.parametrize("model", ["tied", "untied", "moe", "glm", "deepseek", "deepseek-plain"])


@each_model
@pytest.mark.parametrize("batching", ["packed", "padded"])
def test_log_probs_equal_transformers(folders, run, model, batching):
    reference = transformers_model(folders[model])
    found, batch = run(model, settings=but(batching=batching))[0], make_batch()
    for i, tokens in enumerate(batch["tokens"]):
        with torch.no_grad():
            expected = next_token_log_probs(reference, tokens).numpy()
        np.testing.assert_allclose(found["log_probs"][i][1:], expected, atol=1e-5)
        np.testing.assert_allclose(found["masked"][i][1:], expected * batch["loss_mask"][i][1:], atol=1e-5)
        assert found["log_probs"][i][0] == 0
    for first, masked in zip(found["first"], found["masked"], strict=True):
        np.testing.assert_allclose(first, masked, atol=1e-6)


@each_model
def test_training_equals_plain_torch(folders, run, model):
    """SFT steps by transformers' model and torch's AdamW."""
    reference, batch = transformers_model(folders[model]), make_batch()
    decayed = [p for p in reference.parameters() if p.ndim > 1]
    plain = [p for p in reference.parameters() if p.ndim == 1]
    adam = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": OPTIMIZER.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        betas=(OPTIMIZER.beta1, OPTIMIZER.beta2), eps=OPTIMIZER.eps)
    found = run(model, "sft")[0]
    for step, metrics in enumerate(found["metrics"], start=1):
        loss, count = sft_loss(reference, batch)
        adam.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), OPTIMIZER.clip_grad)
        lr = OPTIMIZER.lr * (1 - (step - 1) / 9)
        for group in adam.param_groups:
            group["lr"] = lr
        adam.step()
        assert metrics["loss/total"] == pytest.approx(float(loss.detach()), rel=1e-5)
        assert metrics["grad_norm"] == pytest.approx(float(norm), rel=1e-5)
        assert metrics["lr"] == pytest.approx(lr)
        assert metrics["tokens"] == count
    for name, wanted in on_disk(reference).items():
        np.testing.assert_allclose(found["after"][name], wanted, rtol=1e-4, atol=1e-5, err_msg=name)


def on_disk(reference) -> dict[str, np.ndarray]:
    """Tensors as transformers stores them: an expert's on its own."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        reference.save_pretrained(folder)
        return read_tensors(folder)


def read_tensors(folder) -> dict[str, np.ndarray]:
    with safe_open(f"{folder}/model.safetensors", framework="np") as file:
        names = file.keys()
        return {name: file.get_tensor(name) for name in names}


@pytest.mark.parametrize(("model", "parallel"), [
    ("tied", DENSE["tp2pp2"]), ("tied", DENSE["pp2vpp2"]), ("untied", DENSE["tp2cp2"]), ("moe", MOE["tp2ep2"]),
    ("moe", MOE["etp2"]), ("glm", MOE["pp2ep2"]), ("glm", MOE["ep4"]),
])
def test_publication_is_bit_identical_to_the_file(run, folders, model, parallel):
    stored = read_tensors(folders[model])
    before = run(model, settings=but(parallel=parallel))[0]["before"]
    assert set(before) == set(stored)
    for tensor, values in stored.items():
        np.testing.assert_array_equal(before[tensor], values, err_msg=tensor)


@pytest.mark.parametrize("model", ["moe", "glm"])
@pytest.mark.parametrize("parallel", [MOE["tp2ep2"], MOE["pp2ep2"]], ids=["tp2ep2", "pp2ep2"])
def test_shared_experts_and_dense_layers_divide_too(run, model, parallel):
    assert_same_run(run(model, settings=but(parallel=parallel)), run(model)[0])


@pytest.mark.parametrize("changes", [
    {"recompute": "full"}, {"recompute": "selective"},
    {"recompute": "full", "parallel": DENSE["pp2vpp2"]},
    {"distributed_optimizer": True, "parallel": DENSE["dp2"]},
    {"distributed_optimizer": True, "parallel": ParallelConfig(world_size=4, tp=2, sequence_parallel=True)},
    {"parallel": ParallelConfig(world_size=2, tp=2, sequence_parallel=True)},
    {"parallel": ParallelConfig(world_size=4, tp=2, pp=2, sequence_parallel=True), "batching": "padded"},
    {"micro_batch_tokens": 1000}, {"logits_tokens": 5},
], ids=str)
def test_options_that_change_memory_do_not_change_results(run, changes):
    settings = but(**changes)
    assert_same_run(run("tied", settings=settings), run("tied")[0])


@pytest.mark.parametrize("changes", [
    {"recompute": "full", "parallel": MOE["pp2ep2"]},
    {"distributed_optimizer": True, "parallel": MOE["ep2"]},
    {"distributed_optimizer": True, "parallel": MOE["tp2ep2"]},
], ids=str)
def test_the_same_for_experts(run, changes):
    assert_same_run(run("moe", settings=but(**changes)), run("moe")[0])


@pytest.mark.parametrize("parallel", [ONE, DENSE["tp2"], DENSE["pp2"]], ids=["one", "tp2", "pp2"])
def test_bfloat16_follows_float32(run, parallel):
    """bfloat16 has 8 bits of mantissa: a relative error of 2^-8 per operation."""
    found = run("tied", "sft", settings=but(precision="bfloat16", parallel=parallel))[0]
    wanted = run("tied", "sft")[0]
    for step in range(2):
        assert found["metrics"][step]["loss/total"] == pytest.approx(wanted["metrics"][step]["loss/total"], rel=2e-2)
        assert found["metrics"][step]["grad_norm"] == pytest.approx(wanted["metrics"][step]["grad_norm"], rel=1e-1)
    # Updates of 1e-2 would vanish in bfloat16 weights near 1 without float32 masters beside them.
    moved = [np.abs(found["after"][name] - found["before"][name]).mean() for name in wanted["after"]]
    expected = [np.abs(wanted["after"][name] - wanted["before"][name]).mean() for name in wanted["after"]]
    assert np.sum(moved) == pytest.approx(np.sum(expected), rel=0.2)


def test_expert_bias_stays_float32_under_bfloat16(run, folders):
    """Megatron-core would round it, and the learner would go on to publish what it no longer routes with."""
    stored, rate = read_tensors(folders["glm"]), 1e-4
    settings = but(precision="bfloat16", moe=MoEConfig(expert_bias_update_rate=rate))
    found = run("glm", "sft", settings=settings)[0]
    for name in (name for name in stored if name.endswith("e_score_correction_bias")):
        np.testing.assert_array_equal(found["before"][name], stored[name])
        moved = np.abs(found["after"][name] - stored[name]) / rate
        np.testing.assert_allclose(moved, np.round(moved), atol=1e-2)
        assert moved.max() == pytest.approx(2, abs=1e-2)


def test_recomputation_runs_the_layers_again(ranks, folders):
    counts = {kind: ranks.run(count_layer_calls, 1, folders["tied"], but(recompute=kind))[0]
              for kind in ("none", "selective", "full")}
    layers, micro_batches = 8, counts["none"]["layers"] // 8
    assert counts["none"] == {"layers": layers * micro_batches, "attention": layers * micro_batches}
    assert counts["selective"] == {"layers": layers * micro_batches, "attention": 2 * layers * micro_batches}
    assert counts["full"] == {"layers": 2 * layers * micro_batches, "attention": 2 * layers * micro_batches}


def count_layer_calls(rank, rendezvous, folder, settings):
    counts = {"layers": 0, "attention": 0}

    def count(kind):
        def hook(*_):
            counts[kind] += 1
        return hook

    with learner_of(rank, rendezvous, folder, settings) as learner:
        for layer in learner._chunks[0].decoder.layers:
            layer.mlp.register_forward_hook(count("layers"))
            layer.self_attention.core_attention.register_forward_hook(count("attention"))
        learner.step(make_batch())
    return counts


def test_fewer_sequences_than_data_parallel_ranks(run):
    for parallel in (DENSE["dp2"], DENSE["pp2vpp2"]):
        assert_same_run(run("tied", settings=but(parallel=parallel), sequences=1), run("tied", sequences=1)[0])


@pytest.mark.parametrize(("model", "parallel"), [("tied", DENSE["tp2pp2"]), ("glm", MOE["tp2ep2"])])
def test_random_weights_do_not_depend_on_the_layout(run, model, parallel):
    made = [run(model, settings=but(parallel=p), initial="random")[0]["before"]
            for p in (ONE, parallel)]
    for name, values in made[0].items():
        np.testing.assert_array_equal(made[1][name], values)
        if values.ndim == 2:
            assert values.std() == pytest.approx(0.1, rel=0.2)
        else:
            assert (values == (0 if name.endswith("bias") else 1)).all()


def test_a_missing_field_is_named(ranks, folders):
    with pytest.raises(AssertionError, match="needs the batch fields .*advantages"):
        ranks.run(step_without_advantages, 1, folders["tied"])


def step_without_advantages(rank, rendezvous, folder):
    with learner_of(rank, rendezvous, folder, SETTINGS, PolicyLossConfig()) as learner:
        batch = make_batch()
        learner.step(Batch({"tokens": batch["tokens"], "loss_mask": batch["loss_mask"]}))


def test_damage_to_published_weights_is_found_by_the_ranks_that_hold_them(ranks, folders):
    results = ranks.run(find_damage, 2, folders["tied"], but(parallel=DENSE["tp2"]))
    assert results == [([], ["model.norm.weight"]), ([], ["model.embed_tokens.weight", "model.norm.weight"])]


def find_damage(rank, rendezvous, folder, settings):
    import torch.distributed as dist

    with learner_of(rank, rendezvous, folder, settings) as learner, shared_bucket(learner, rank) as manifest:
        learner.gather(0)
        dist.barrier()
        intact = learner.differing(manifest)
        dist.barrier()
        if rank == 0:
            published = attach(manifest)
            published["model.norm.weight"][0] += 1
            published["model.embed_tokens.weight"][-1, -1] += 1
        dist.barrier()
        damaged = learner.differing(manifest)
        dist.barrier()  # the segment goes with rank 0
        return intact, damaged


@pytest.mark.parametrize("parallel", [ONE, DENSE["tp2"], DENSE["cp2"], DENSE["dp2"]], ids=["one", "tp2", "cp2", "dp2"])
def test_the_first_update_after_scoring_has_ratio_one(ranks, folders, parallel):
    metrics = ranks.run(on_policy_step, parallel.world_size, folders["tied"], but(parallel=parallel))[0]
    for key, wanted in {"ratio_mean": 1, "ratio_max": 1, "kl_old": 0, "clip_fraction": 0, "kl_rollout": 0}.items():
        assert metrics[f"loss/{key}"] == pytest.approx(wanted, abs=1e-5)


def on_policy_step(rank, rendezvous, folder, settings):
    import torch.distributed as dist

    with learner_of(rank, rendezvous, folder, settings, PolicyLossConfig()) as learner:
        batch, scores = make_batch(), [None]
        scores[0] = learner.log_probs(batch)
        dist.broadcast_object_list(scores)
        return learner.step(batch.with_fields(old_log_probs=scores[0], rollout_log_probs=scores[0])).metrics

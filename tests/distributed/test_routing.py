"""Routers against transformers' own: prescribed experts, balancing, statistics."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest
import torch

from megatron_pbsd.config import LearnerConfig, MoEConfig, ParallelConfig
from tests.distributed.layouts import MOE, ONE
from tests.distributed.reference import next_token_log_probs, sft_loss, transformers_model
from tests.distributed.training import OPTIMIZER, STEPS, assert_same_run, learner_of, make_batch, published

EXPERTS, TOP_K, LAYERS = 8, 2, {"moe": 3, "glm": 3}
SETTINGS = LearnerConfig(
    parallel=ONE, optimizer=OPTIMIZER, micro_batch_tokens=1000, moe=MoEConfig(routing_replay=True))


def prescribed_batch(model: str, share: float = 0.8):
    """Random experts for most tokens, none for the others."""
    rng = np.random.default_rng(1)
    batch = make_batch()
    routed = []
    for length in batch.lengths:
        experts = np.argsort(rng.random((length, LAYERS[model], EXPERTS)), -1)[..., :TOP_K]
        experts[rng.random(length) > share] = -1
        routed.append(experts)
    return batch.with_fields(routed_experts=routed)


def train(rank, rendezvous, folder, settings, batch):
    with learner_of(rank, rendezvous, folder, settings) as learner:
        scores = learner.log_probs(batch)
        updates = [learner.step(batch) for _ in range(STEPS)]
        return {"log_probs": scores, "masked": scores, "first": updates[0].log_probs,
                "metrics": [update.metrics for update in updates], "after": published(learner, rank)}


@contextmanager
def routers_of(reference, replace=None):
    """(layer, what its router returned) of every call; `replace(layer, router, logits)` gives experts to choose."""
    calls = []
    gates = [layer.mlp.gate for layer in reference.model.layers if hasattr(layer.mlp, "gate")]

    def hook(layer):
        def choose(gate, _, output):
            logits, weights, chosen = output
            if replace is not None and (wanted := replace(layer, chosen)) is not None:
                scores = logits.softmax(-1) if not hasattr(gate, "routed_scaling_factor") else logits.sigmoid()
                weights = scores.gather(-1, wanted)
                weights = weights / weights.sum(-1, keepdim=True) * getattr(gate, "routed_scaling_factor", 1.0)
                chosen = wanted
            calls.append((layer, logits, chosen))
            return logits, weights, chosen
        return choose

    handles = [gate.register_forward_hook(hook(i)) for i, gate in enumerate(gates)]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("model", ["moe", "glm"])
def test_replayed_experts_give_the_log_probs_of_a_model_that_chooses_them(ranks, folders, model):
    batch, reference = prescribed_batch(model), transformers_model(folders[model])
    found = ranks.run(train, 1, folders[model], SETTINGS, batch)[0]
    for i, tokens in enumerate(batch["tokens"]):
        prescribed = torch.from_numpy(batch["routed_experts"][i].astype(np.int64))

        def replace(layer, chosen, prescribed=prescribed):
            return torch.where(prescribed[:, layer] >= 0, prescribed[:, layer], chosen)

        with torch.no_grad(), routers_of(reference, replace):
            expected = next_token_log_probs(reference, tokens).numpy()
        np.testing.assert_allclose(
            found["log_probs"][i][1:], expected * batch["loss_mask"][i][1:], atol=1e-5)


@pytest.mark.parametrize("changes", [
    {"parallel": MOE["tp2ep2"]}, {"parallel": MOE["pp2ep2"], "recompute": "full", "micro_batch_tokens": 48},
    {"parallel": MOE["cp2ep2"]}, {"batching": "padded", "micro_batch_tokens": 48},
    {"parallel": ParallelConfig(world_size=2, tp=1, pp=2, vpp=2), "recompute": "full", "micro_batch_tokens": 48},
], ids=["tp2ep2", "pp2ep2-recompute", "cp2ep2", "padded", "pp2vpp2-recompute"])
def test_replay_in_forward_backward_and_recomputation_equals_one_rank(ranks, folders, changes):
    batch, settings = prescribed_batch("moe"), SETTINGS.model_copy(update=changes)
    expected = ranks.run(train, 1, folders["moe"], SETTINGS, batch)[0]
    assert_same_run(ranks.run(train, settings.parallel.world_size, folders["moe"], settings, batch), expected)


def read_positions(reference, batch):
    """Per layer: logits [positions, experts] and chosen experts of every token that is read, all sequences."""
    found = []
    for tokens in batch["tokens"]:
        with routers_of(reference) as calls:
            reference(torch.from_numpy(tokens[:-1])[None])
        found.append(calls)
    layers = range(len(found[0]))
    return [(torch.cat([calls[i][1] for calls in found]), torch.cat([calls[i][2] for calls in found])) for i in layers]


@pytest.mark.parametrize("model", ["moe", "glm"])
@pytest.mark.parametrize("parallel", [ONE, MOE["tp2ep2"], MOE["pp2ep2"]], ids=["one", "tp2ep2", "pp2ep2"])
def test_statistics_describe_every_layer(ranks, folders, model, parallel):
    settings = SETTINGS.model_copy(update={"parallel": parallel, "batching": "padded", "micro_batch_tokens": 48})
    batch, reference = make_batch(), transformers_model(folders[model])
    metrics = ranks.run(train, parallel.world_size, folders[model], settings, batch)[0]["metrics"][0]
    numbers = [i for i, layer in enumerate(reference.model.layers) if hasattr(layer.mlp, "gate")]
    with torch.no_grad():
        layers = read_positions(reference, batch)
    for number, (logits, chosen) in zip(numbers, layers, strict=True):
        load = torch.bincount(chosen.flatten(), minlength=EXPERTS).float()
        p = logits.softmax(-1) if model == "moe" else logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True)
        prefix = f"router/layer_{number:02d}"
        assert metrics[f"{prefix}/load_max"] == pytest.approx(float(load.max() / load.mean()), rel=1e-6)
        assert metrics[f"{prefix}/load_min"] == pytest.approx(float(load.min() / load.mean()), rel=1e-6)
        assert metrics[f"{prefix}/entropy"] == pytest.approx(float(-(p * p.log()).sum(-1).mean()), rel=1e-4)
        assert metrics[f"{prefix}/dropped"] == 0
    assert sum(name.endswith("load_max") for name in metrics) == len(numbers)


def test_balancing_loss_has_the_gradient_of_its_formula(ranks, folders):
    """One SFT step plus coefficient * sum over layers of E sum_e f_e P_e (Switch Transformer, eq. 4-6)."""
    coefficient = 0.5
    settings = SETTINGS.model_copy(update={"moe": MoEConfig(aux_loss_coefficient=coefficient)})
    batch, reference = make_batch(), transformers_model(folders["moe"])
    found = ranks.run(train, 1, folders["moe"], settings, batch)[0]["metrics"][0]
    (loss, _), balance = sft_loss(reference, batch), []
    for logits, chosen in read_positions(reference, batch):
        load = torch.bincount(chosen.flatten(), minlength=EXPERTS).float() / chosen.numel()
        balance.append(EXPERTS * (load * logits.softmax(-1).mean(0)).sum())
    (loss + coefficient * sum(balance)).backward()
    norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 1e9)
    assert found["grad_norm"] == pytest.approx(float(norm), rel=1e-5)
    for number, value in zip((0, 1, 3), balance, strict=True):
        reported = found[f"router/layer_{number:02d}/aux_loss"]
        assert reported == pytest.approx(coefficient * float(value.detach()), rel=1e-5)


@pytest.mark.parametrize("changes", [
    {}, {"parallel": MOE["tp2ep2"]}, {"parallel": MOE["pp2ep2"], "recompute": "full"}, {"batching": "padded"},
], ids=["one", "tp2ep2", "pp2ep2-recompute", "padded"])
def test_expert_bias_moves_against_the_load(ranks, folders, changes):
    """DeepSeek-V3, section 2.1.2: plus or minus the rate, by the sign of the mean load minus the expert's."""
    rate = 0.01
    settings = SETTINGS.model_copy(
        update={"moe": MoEConfig(expert_bias_update_rate=rate), "micro_batch_tokens": 48, **changes})
    batch, reference = make_batch(), transformers_model(folders["glm"])
    after = ranks.run(one_step, settings.parallel.world_size, folders["glm"], settings, batch)[0]
    numbers = [i for i, layer in enumerate(reference.model.layers) if hasattr(layer.mlp, "gate")]
    with torch.no_grad():
        layers = read_positions(reference, batch)
    for number, (_, chosen) in zip(numbers, layers, strict=True):
        load = torch.bincount(chosen.flatten(), minlength=EXPERTS).float()
        before = reference.model.layers[number].mlp.gate.e_score_correction_bias
        wanted = before + rate * (load.mean() - load).sign()
        np.testing.assert_allclose(
            after[f"model.layers.{number}.mlp.gate.e_score_correction_bias"], wanted, atol=1e-7)


def one_step(rank, rendezvous, folder, settings, batch):
    with learner_of(rank, rendezvous, folder, settings) as learner:
        learner.step(batch)
        return published(learner, rank)

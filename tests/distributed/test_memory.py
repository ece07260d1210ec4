"""A learner gives its memory away and takes it back: real storages of a real model, optimizer and process."""

from __future__ import annotations

import json
import os
from functools import partial

import numpy as np
import pytest
import torch

from megatron_pbsd import losses
from megatron_pbsd.batch import Batch
from megatron_pbsd.config import LearnerConfig, ModelConfig, OptimizerConfig, ParallelConfig, SFTConfig

pytestmark = pytest.mark.slow
VOCABULARY = 96_000
"""Times 256 numbers of 4 bytes: gradients of about 100 MB."""


KINDS = {
    "plain": {}, "sharding": {"distributed_optimizer": True}, "bfloat16": {"precision": "bfloat16"},
    "sharding-bfloat16": {"distributed_optimizer": True, "precision": "bfloat16"},
}
"""What decides which tensors a learner holds."""


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """A model that is nearly all embedding."""
    folder = tmp_path_factory.mktemp("big")
    (folder / "config.json").write_text(json.dumps({
        "model_type": "qwen3", "vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 256,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "max_position_embeddings": 128, "rms_norm_eps": 1e-6, "initializer_range": 0.05, "tie_word_embeddings": True,
        "hidden_act": "silu", "attention_bias": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}))
    return folder


def build(rank, rendezvous, folder, kind, initial="load", world_size=1):
    """A learner, the model chunks as Megatron wraps them, and the memory of both."""
    from megatron_pbsd.learner.learner import Learner

    config = LearnerConfig(
        parallel=ParallelConfig(world_size=world_size, tp=1), optimizer=OptimizerConfig(lr=1e-2, warmup_steps=1),
        micro_batch_tokens=48, **KINDS[kind])
    learner = Learner(rank, rendezvous, ModelConfig(path=str(folder), initial_weights=initial), config,
                      losses.build(SFTConfig()), seed=3, total_steps=10)
    return learner, learner._model, learner._memory


def batch(seed=0, vocabulary=64):
    rng = np.random.default_rng(seed)
    tokens = [rng.integers(0, vocabulary, 12) for _ in range(4)]
    return Batch({"tokens": tokens, "loss_mask": [np.ones(12, np.float32) for _ in tokens]})


def state(learner, chunks):
    """Everything a step depends on, copied."""
    tensors = {f"{i}.{name}": p for i, chunk in enumerate(chunks) for name, p in chunk.named_parameters()}
    for number, optimizer in enumerate(torch_optimizers(learner)):
        for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
            tensors[f"optimizer {number} {i}"] = p
            tensors |= {f"optimizer {number} {i} {k}": v for k, v in optimizer.state[p].items()
                        if isinstance(v, torch.Tensor)}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def torch_optimizers(learner):
    optimizer = learner._optimizer
    return [part.optimizer for part in getattr(optimizer, "chained_optimizers", [optimizer])]


def differing(first, second):
    """Names of tensors that differ in any bit."""
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(*(
        tensors[name].reshape(-1).view(torch.uint8) for tensors in (first, second)))]


def two_steps(rank, rendezvous, folder, kind, between, world_size):
    """State after the steps, having done `between` in the middle."""
    learner, chunks, memory = build(rank, rendezvous, folder, kind, world_size=world_size)
    try:
        metrics = [learner.step(batch(0)).metrics]
        between(memory)
        metrics.append(learner.step(batch(1)).metrics)
        return metrics, state(learner, chunks)
    finally:
        learner.close()


def nothing(memory):
    pass


def release_and_regain(memory):
    memory.release("the rollout")
    memory.regain()


def release_by_and_by(memory):
    memory.release("publication", keep=("parameters", "communicators"))
    memory.release("the rollout")
    memory.regain(("parameters",))
    memory.regain()


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_training_goes_on_bit_for_bit(ranks, folders, kind, world_size):
    run = partial(ranks.run, two_steps, world_size, folders["tied"], kind)
    expected = run(nothing, world_size)
    for between in (release_and_regain, release_by_and_by):
        for (metrics, found), (wanted_metrics, wanted) in zip(run(between, world_size), expected, strict=True):
            assert metrics == wanted_metrics
            assert differing(found, wanted) == []


def same_objects(rank, rendezvous, folder, kind):
    learner, chunks, memory = build(rank, rendezvous, folder, kind)
    try:
        learner.step(batch())
        before, objects = state(learner, chunks), views(learner, chunks)
        for chunk in chunks:
            chunk.buffers[0].grad_data.fill_(7)
        held = memory.account()
        released = memory.release("the rollout")
        empty = memory.account()
        memory.regain()
        return {
            "held": held, "released": released, "empty": empty, "again": memory.account(),
            "differing": differing(state(learner, chunks), before), "views": views(learner, chunks) == objects,
            "gradients": max(float(p.main_grad.abs().max()) for chunk in chunks for p in chunk.parameters())}
    finally:
        learner.close()


def views(learner, chunks):
    """Which tensor views which storage, and where: names of storages are their order."""
    tensors = [t for chunk in chunks for p in chunk.parameters() for t in (p, p.main_grad)]
    tensors += [p for optimizer in torch_optimizers(learner) for group in optimizer.param_groups
                for p in group["params"]]
    order = {}
    return [(id(t), order.setdefault(t.untyped_storage()._cdata, len(order)), t.storage_offset(), t.shape, t.stride())
            for t in tensors]


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_tensors_come_back_with_the_same_values(ranks, folders, kind):
    [found] = ranks.run(same_objects, 1, folders["tied"], kind)
    assert found["views"] and found["differing"] == []
    assert found["gradients"] == 0
    assert set(found["empty"].values()) == {0}
    assert found["again"] == found["held"] == found["released"]


def sums(rank, rendezvous, folder, kind):
    learner, chunks, memory = build(rank, rendezvous, folder, kind)
    try:
        fresh = memory.account()
        learner.step(batch())
        numbers = sum(p.numel() for p in chunks[0].parameters())
        padded = sum(buffer.grad_data.numel() for buffer in chunks[0].buffers)
        return fresh, memory.account(), numbers, padded, len(list(chunks[0].parameters()))
    finally:
        learner.close()


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_by_category(ranks, folders, kind):
    """4 bytes of gradient per parameter, 8 of Adam's moments and, in bfloat16, 4 of master weight."""
    [(fresh, found, numbers, padded, parameters)] = ranks.run(sums, 1, folders["tied"], kind)
    bytes_each = 2 if "bfloat16" in kind else 4
    assert numbers <= padded and (padded == numbers or "sharding" in kind)
    assert found["parameters"] == fresh["parameters"] == bytes_each * (
        padded if "sharding" in kind else numbers)
    assert found["gradients"] == 4 * padded
    assert found["master_weights"] == (4 * numbers if bytes_each == 2 else 0)
    # Adam counts its steps in a float32 per parameter.
    assert 8 * numbers <= found["optimizer_state"] <= 8 * numbers + 4 * parameters
    assert fresh["gradients"] == 4 * padded and fresh["optimizer_state"] == 0
    assert found["communicators"] == 0


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def resident(rank, rendezvous, folder, kind):
    learner, _, memory = build(rank, rendezvous, folder, kind, "random")
    try:
        learner.step(batch(vocabulary=VOCABULARY))
        held, before = memory.account(), resident_bytes()
        memory.release("the rollout", keep=("parameters", "master_weights", "optimizer_state"))
        without_gradients = resident_bytes()
        memory.release("the rollout")
        in_host_memory = resident_bytes()
        memory.regain()
        learner.step(batch(vocabulary=VOCABULARY))
        return held, before, without_gradients, in_host_memory, resident_bytes()
    finally:
        learner.close()


@pytest.mark.parametrize("kind", ["plain", "sharding"])
def test_the_process_shrinks_by_its_gradients(ranks, big, kind):
    """On a CPU the host copies are as large as what they are copies of; gradients have none."""
    [(held, before, without_gradients, in_host_memory, after)] = ranks.run(resident, 1, big, kind)
    gradients = held["gradients"]
    assert gradients > 95e6
    assert before - without_gradients > 0.9 * gradients
    assert abs(in_host_memory - without_gradients) < 0.2 * gradients
    assert abs(after - before) < 0.5 * gradients


def refusals(rank, rendezvous, folder):
    from megatron_pbsd.learner.errors import LearnerError

    learner, _, memory = build(rank, rendezvous, folder, "plain")
    said = []

    def attempt(run):
        try:
            run()
        except LearnerError as error:
            said.append(str(error))
        else:
            said.append("")

    try:
        learner.step(batch())
        learner.release("the rollout", keep=("parameters", "communicators"))
        attempt(lambda: learner.log_probs(batch()))
        attempt(lambda: learner.step(batch()))
        learner.release("the rollout")
        attempt(lambda: learner.log_probs(batch()))
        attempt(lambda: learner._model[0](None, None, None, None))
        attempt(lambda: learner.gather(0))
        attempt(lambda: learner.save("nowhere"))
        attempt(lambda: memory.release("the rollout", keep=("paramters",)))
        attempt(lambda: memory.regain(("weights",)))
        learner.regain()
        attempt(lambda: learner.step(batch()))
        return said
    finally:
        learner.close()


def test_use_of_released_memory_is_refused(ranks, folders):
    [said] = ranks.run(refusals, 1, folders["tied"])
    released = "whose memory was released for the rollout"
    assert said == [
        "",
        f"step needs gradients, optimizer_state, {released}",
        f"score needs parameters, communicators, {released}",
        f"the forward pass needs parameters, gradients, communicators, {released}",
        f"gather needs parameters, {released}",
        f"save needs parameters, optimizer_state, communicators, {released}",
        "no such categories of device memory: ['paramters']; there are parameters, gradients, master_weights, "
        "optimizer_state, communicators",
        "no such categories of device memory: ['weights']; there are parameters, gradients, master_weights, "
        "optimizer_state, communicators",
        "",
    ]

"""Every family computes on one rank and on many what transformers computes, and gives back the weights it was given."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from tiny_models import make_tiny

from megatron_pbsd import losses
from megatron_pbsd.batch import Batch
from megatron_pbsd.config import LearnerConfig, ModelConfig, ParallelConfig, SFTConfig
from tests.distributed.training import OPTIMIZER, make_batch, published

VOCABULARY = 131
"""A prime: every tensor-parallel size pads it."""
MODELS = {
    "llama": ("llama", {}),
    "smollm2": ("llama", {
        "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 36, "head_dim": 4,
        "tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "mistral": ("mistral", {}),
    "mixtral": ("mixtral", {}),
    "qwen3": ("qwen3", {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 40}),
    "glm": ("glm4_moe", {
        "num_hidden_layers": 7, "first_k_dense_replace": 3, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e5, "partial_rotary_factor": 0.75}}),
    "deepseek": ("deepseek_v3", {
        "num_hidden_layers": 7, "first_k_dense_replace": 3, "num_attention_heads": 6, "num_key_value_heads": 6,
        "hidden_size": 40, "q_lora_rank": 21, "kv_lora_rank": 13, "v_head_dim": 11, "n_shared_experts": 1,
        "rms_norm_eps": 1e-2}),
    "deepseek of halves": ("deepseek_v3", {
        "num_hidden_layers": 7, "first_k_dense_replace": 3, "q_lora_rank": None, "kv_lora_rank": 13, "n_group": 1,
        "topk_group": 1, "num_experts_per_tok": 3, "rope_interleave": False, "tie_word_embeddings": True,
        "rms_norm_eps": 1e-2}),
    "five layers": ("llama", {"num_hidden_layers": 5, "tie_word_embeddings": True}),
    "five with experts": ("qwen3_moe", {"num_hidden_layers": 5, "mlp_only_layers": [0, 3]}),
}
"""name → model_type and what differs from its tiny model."""

ONE = {"world_size": 1, "tp": 1}
CASES = [
    *((name, ONE) for name in MODELS),
    ("llama", {"world_size": 4, "tp": 2, "pp": 2}),
    ("llama", {"world_size": 2, "tp": 1, "cp": 2}),
    ("smollm2", {"world_size": 3, "tp": 3}),
    ("qwen2", {"world_size": 4, "tp": 2, "pp": 2, "sequence_parallel": True}),
    ("mistral", {"world_size": 2, "tp": 2}),
    ("mixtral", {"world_size": 4, "tp": 2, "ep": 2}),
    ("mixtral", {"world_size": 4, "tp": 2, "pp": 2, "etp": 2}),
    ("qwen3", {"world_size": 3, "tp": 3}),
    ("glm", {"world_size": 4, "tp": 2, "pp": 2, "etp": 2}),
    ("deepseek", {"world_size": 4, "tp": 1, "pp": 4}),
    ("deepseek", {"world_size": 4, "tp": 2, "pp": 2, "ep": 2}),
    ("deepseek of halves", {"world_size": 4, "tp": 2, "cp": 2, "ep": 4}),
    ("five layers", {"world_size": 2, "tp": 1, "pp": 2}),
    ("five layers", {"world_size": 4, "tp": 1, "pp": 4}),
    ("five layers", {"world_size": 2, "tp": 1, "pp": 2, "vpp": 2}),
    ("five with experts", {"world_size": 4, "tp": 1, "pp": 2, "ep": 2}),
    ("five with experts", {"world_size": 2, "tp": 1, "pp": 2, "vpp": 2}),
]


def compute(rank, rendezvous, folder, parallel):
    """Scores of every token, with its whole distribution; the published weights before and after a step."""
    from megatron_pbsd.learner.learner import Learner

    settings = LearnerConfig(parallel=parallel, optimizer=OPTIMIZER, micro_batch_tokens=48, logits_tokens=16)
    learner = Learner(rank, rendezvous, ModelConfig(path=str(folder)), settings, losses.build(SFTConfig()), seed=3,
                      total_steps=10)
    try:
        batch = make_batch(vocabulary=VOCABULARY)
        scores = learner.score(Batch({"tokens": batch["tokens"]}),
                               ("log_probs", "entropy", "top_tokens", "top_log_probs"), top=VOCABULARY)
        before = published(learner, rank)
        update = learner.step(batch)
        return {"scores": scores, "before": before, "after": published(learner, rank), "metrics": update.metrics}
    finally:
        learner.close()


@pytest.fixture(scope="module")
def run(ranks, tmp_path_factory):
    """(model, layout) → its folder, and what rank 0 returns from `compute`; each is run once."""
    folders, made = {}, {}

    def get(name, layout):
        if name not in folders:
            model_type, changes = MODELS[name]
            folders[name] = make_tiny(
                model_type, tmp_path_factory.mktemp(name), vocab_size=VOCABULARY, **changes)
        key = (name, tuple(layout.items()))
        if key not in made:
            parallel = ParallelConfig(**layout)
            made[key] = ranks.run(compute, parallel.world_size, folders[name], parallel)[0]
        return folders[name], made[key]

    return get


@pytest.mark.parametrize(("name", "layout"), CASES, ids=str)
def test_distributions_are_those_of_transformers(run, name, layout):
    from transformers import AutoModelForCausalLM

    folder, found = run(name, layout)
    model, scores = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), found["scores"]
    for i, tokens in enumerate(make_batch(vocabulary=VOCABULARY)["tokens"]):
        with torch.no_grad():
            expected = model(torch.from_numpy(tokens)[None]).logits[0, :-1].log_softmax(-1).numpy()
        whole = np.full_like(expected, np.nan)
        np.put_along_axis(whole, scores["top_tokens"][i][1:], scores["top_log_probs"][i][1:], -1)
        np.testing.assert_allclose(whole, expected, atol=1e-5)
        np.testing.assert_allclose(
            scores["log_probs"][i][1:], expected[np.arange(len(expected)), tokens[1:]], atol=1e-5)
        np.testing.assert_allclose(scores["entropy"][i][1:], -(np.exp(expected) * expected).sum(-1), atol=1e-5)


@pytest.mark.parametrize(("name", "layout"), CASES, ids=str)
def test_weights_come_back_bit_identical(run, name, layout):
    folder, found = run(name, layout)
    stored = load_file(folder / "model.safetensors")
    assert found["before"].keys() == stored.keys()
    for tensor, values in stored.items():
        np.testing.assert_array_equal(found["before"][tensor], values, err_msg=tensor)


@pytest.mark.parametrize(("name", "layout"), [case for case in CASES if case[1] != ONE], ids=str)
def test_layouts_train_alike(run, name, layout):
    (_, found), (_, expected) = run(name, layout), run(name, ONE)
    assert found["metrics"] == pytest.approx(expected["metrics"], rel=1e-5, abs=1e-7)
    for tensor, values in expected["after"].items():
        np.testing.assert_allclose(found["after"][tensor], values, rtol=1e-5, atol=2e-6, err_msg=tensor)

"""Multi-head latent attention at every layout: what one rank computes, and the file's weights bit for bit.

That one rank computes what transformers computes is in `test_learner.py`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron_pbsd.config import LearnerConfig, ParallelConfig
from megatron_pbsd.rollout.engines.embedded.engine import EmbeddedEngine
from megatron_pbsd.rollout.engines.protocol import Chunk
from tests.distributed.layouts import MOE, ONE
from tests.distributed.test_learner import read_tensors
from tests.distributed.training import BUDGET, LOSSES, OPTIMIZER, assert_same_run, make_batch, train

SETTINGS = LearnerConfig(parallel=ONE, optimizer=OPTIMIZER, micro_batch_tokens=BUDGET)
PARALLEL = MOE | {
    "pp2": ParallelConfig(world_size=2, tp=1, pp=2),
    "pp2vpp2": ParallelConfig(world_size=2, tp=1, pp=2, vpp=2),
    "tp2pp2": ParallelConfig(world_size=4, tp=2, pp=2),
    "tp2cp2": ParallelConfig(world_size=4, tp=2, cp=2),
    "tp4": ParallelConfig(world_size=4, tp=4),
}
BY_DEFAULT = [("deepseek", "tp2ep2", "packed"), ("deepseek-plain", "tp2pp2", "padded"), ("deepseek", "cp2", "packed")]


@pytest.fixture(scope="module")
def run(ranks, folders):
    """What each rank returns from `train`; each combination is run once."""
    made = {}

    def get(model, parallel=ONE, **changes):
        settings = SETTINGS.model_copy(update={"parallel": parallel, **changes})
        key = model, settings.model_dump_json()
        if key not in made:
            made[key] = ranks.run(train, parallel.world_size, folders[model], settings, LOSSES["grpo"])
        return made[key]

    return get


@pytest.mark.parametrize(("model", "layout", "batching"), [
    pytest.param(*case, marks=[] if case in BY_DEFAULT else pytest.mark.slow)
    for case in ((model, layout, batching) for model in ("deepseek", "deepseek-plain")
                 for layout in PARALLEL for batching in ("packed", "padded"))])
def test_layouts(run, folders, model, layout, batching):
    found = run(model, PARALLEL[layout], batching=batching)
    assert_same_run(found, run(model)[0])
    stored = read_tensors(folders[model])
    assert set(found[0]["before"]) == set(stored)
    for name, values in stored.items():
        np.testing.assert_array_equal(found[0]["before"][name], values, err_msg=name)


@pytest.mark.parametrize("model", ["deepseek", "deepseek-plain"])
def test_engine_serves_what_the_learner_trains(run, folders, model):
    assert_scored(EmbeddedEngine(str(folders[model]), name="engine", slots=4, max_context=64), run(model)[0])


def test_kimi_is_the_same_model_under_another_name(ranks, run, folders, tmp_path):
    folder = Path(shutil.copytree(folders["deepseek"], tmp_path / "kimi"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {
        "model_type": "kimi_k2", "auto_map": {"AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"}}))
    assert_same_run(ranks.run(train, 1, folder, SETTINGS, LOSSES["grpo"]), run("deepseek")[0], rtol=0, atol=0)
    assert_scored(EmbeddedEngine(str(folder), name="engine", slots=4, max_context=64), run("deepseek")[0])


def assert_scored(engine, trained):
    """By one forward pass, and as tokens that are sampled from a cache."""
    sequences = make_batch()["tokens"]
    scored = engine.score([tokens.tolist() for tokens in sequences])
    for found, wanted in zip(scored, trained["log_probs"], strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5)
    engine.submit([Chunk(f"r{i}", tuple(tokens.tolist()), 9, seed=1) for i, tokens in enumerate(sequences)])
    sampled = []
    while ended := engine.collect():
        sampled += ended
    contexts = [sequences[int(result.request_id[1:])].tolist() + list(result.tokens) for result in sampled]
    for result, scores in zip(sampled, engine.score(contexts), strict=True):
        np.testing.assert_allclose(result.log_probs, scores[-9:], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [
    {"recompute": "selective"}, {"recompute": "full", "parallel": PARALLEL["tp2pp2"]},
    {"distributed_optimizer": True, "parallel": PARALLEL["tp2ep2"]}], ids=str)
def test_options_that_change_memory_do_not_change_results(run, changes):
    assert_same_run(run("deepseek", **changes), run("deepseek")[0])

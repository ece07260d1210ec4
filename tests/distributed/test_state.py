"""Training that is saved, loaded at this or another layout and continued, equals training that never stopped."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_pbsd import losses
from megatron_pbsd.config import LearnerConfig, ModelConfig, ParallelConfig, SFTConfig
from tests.distributed.layouts import DENSE, MOE, ONE
from tests.distributed.training import OPTIMIZER, STEPS, make_batch, published

LAYOUTS = {"one": ONE, **DENSE, **MOE, "dp2-distributed": DENSE["dp2"],
           "tp2dp2-distributed": ParallelConfig(world_size=4, tp=2)}


def run(rank, rendezvous, folder, layout, load_from, save_to, seed=3):
    """Steps 0-1, save, steps 2-3; or load, steps 2-3."""
    from megatron_pbsd.learner.learner import Learner

    learner = Learner(
        rank, rendezvous, ModelConfig(path=str(folder), initial_weights="random" if load_from else "load"),
        LearnerConfig(parallel=LAYOUTS[layout], optimizer=OPTIMIZER, micro_batch_tokens=48,
                      distributed_optimizer="distributed" in layout),
        losses.build(SFTConfig()), seed=seed, total_steps=10)
    try:
        if load_from:
            learner.load(load_from)
        else:
            for k in range(STEPS):
                learner.step(make_batch(k))
            learner.save(save_to)
        metrics = [learner.step(make_batch(k)).metrics for k in range(STEPS, 2 * STEPS)]
        return metrics, published(learner, rank), learner.platform.rng_state()
    finally:
        learner.close()


@pytest.fixture(scope="module")
def saved(ranks, folders, tmp_path_factory):
    """(layout name, model) → folder and what the run that wrote it went on to compute."""
    made = {}

    def get(name, model):
        if (name, model) not in made:
            folder = str(tmp_path_factory.mktemp(name) / "learner")
            made[name, model] = folder, ranks.run(
                run, LAYOUTS[name].world_size, folders[model], name, None, folder)
        return made[name, model]

    return get


@pytest.mark.parametrize(("source", "target", "model"), [
    ("one", "one", "tied"), ("tp2", "tp2", "untied"), ("tp2pp2", "tp2pp2", "tied"), ("dp2", "dp2", "tied"),
    ("tp2", "pp2", "tied"), ("pp2", "tp2", "untied"), ("dp2", "one", "tied"), ("one", "tp2pp2", "untied"),
    ("tp2pp2", "dp2", "tied"), ("pp2vpp2", "pp2vpp2", "tied"), ("pp2vpp2", "tp2", "tied"), ("cp2", "pp4vpp2", "tied"),
    ("dp2-distributed", "dp2-distributed", "tied"), ("tp2dp2-distributed", "dp2-distributed", "tied"),
    ("tp2", "tp2", "odd"), ("tp2", "one", "odd"), ("one", "tp2", "odd"),
    ("tp2pp2", "pp2vpp2", "odd"), ("pp2vpp2", "one", "odd"),
    ("tp2dp2-distributed", "dp2-distributed", "odd"), ("dp2-distributed", "tp2dp2-distributed", "odd"),
    ("ep2", "ep2", "moe"), ("tp2ep2", "tp2ep2", "glm"), ("pp2ep2", "pp2ep2", "glm"),
    pytest.param("tp2ep2", "tp2ep2", "deepseek", marks=pytest.mark.slow),
    pytest.param("tp2ep2", "pp2ep2", "deepseek", marks=pytest.mark.slow),
    pytest.param("pp2ep2", "tp2", "deepseek-plain", marks=pytest.mark.slow),
])
def test_resume(ranks, folders, saved, source, target, model):
    folder, expected = saved(source, model)
    found = ranks.run(run, LAYOUTS[target].world_size, folders[model], target, folder, None, 99)
    for got, wanted in zip(found[0][0], expected[0][0], strict=True):
        assert got == pytest.approx(wanted, rel=1e-5, abs=1e-7)
    for name, values in expected[0][1].items():
        np.testing.assert_allclose(found[0][1][name], values, rtol=1e-5, atol=2e-6, err_msg=name)
    if source == target:
        for got, wanted in zip(found, expected, strict=True):
            assert (got[2]["torch"] == wanted[2]["torch"]).all()
            assert got[2]["model_parallel"].keys() == wanted[2]["model_parallel"].keys()


def test_another_kind_of_optimizer_is_named(ranks, folders, saved):
    folder, _ = saved("dp2-distributed", "tied")
    with pytest.raises(AssertionError, match="distributed_optimizer = True, this run has False"):
        ranks.run(run, 2, folders["tied"], "tp2", folder, None)


def test_nothing_to_load_is_named(ranks, folders, tmp_path):
    with pytest.raises(AssertionError, match="holds no learner state"):
        ranks.run(run, 1, folders["tied"], "one", str(tmp_path), None)

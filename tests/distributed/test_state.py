"""Training that is saved, loaded at this or another layout and continued, equals training that never stopped."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_pbsd import losses
from megatron_pbsd.config import LearnerConfig, ModelConfig
from tests.distributed.test_layouts import LAYOUTS, LOSSES, OPTIMIZER, make_batch, published

STEPS = 2


def run(rank, rendezvous, folder, parallel, load_from, save_to, seed=3):
    """Steps 0-1, save, steps 2-3; or load, steps 2-3."""
    from megatron_pbsd.learner.learner import Learner

    learner = Learner(
        rank, rendezvous, ModelConfig(path=str(folder), initial_weights="random" if load_from else "load"),
        LearnerConfig(parallel=parallel, optimizer=OPTIMIZER, micro_batch_tokens=48),
        losses.build(LOSSES["sft"]), seed=seed, total_steps=10)
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
def saved(ranks, hf_folders, tmp_path_factory):
    """(layout name, tied) → folder and what the run that wrote it went on to compute."""
    made = {}

    def get(name, tied):
        if (name, tied) not in made:
            parallel = LAYOUTS[name]
            folder = str(tmp_path_factory.mktemp(name) / "learner")
            made[name, tied] = folder, ranks.run(
                run, parallel.world_size, hf_folders[tied], parallel, None, folder)
        return made[name, tied]

    return get


@pytest.mark.parametrize(("source", "target", "tied"), [
    ("one", "one", True), ("tp2", "tp2", False), ("tp2pp2", "tp2pp2", True), ("dp2", "dp2", True),
    ("tp2", "pp2", True), ("pp2", "tp2", False), ("dp2", "one", True), ("one", "tp2pp2", False),
    ("tp2pp2", "dp2", True),
])
def test_resume(ranks, hf_folders, saved, source, target, tied):
    folder, expected = saved(source, tied)
    parallel = LAYOUTS[target]
    found = ranks.run(run, parallel.world_size, hf_folders[tied], parallel, folder, None, 99)
    for got, wanted in zip(found[0][0], expected[0][0], strict=True):
        assert got == pytest.approx(wanted, rel=1e-5, abs=1e-7)
    for name, values in expected[0][1].items():
        np.testing.assert_allclose(found[0][1][name], values, rtol=1e-5, atol=2e-6, err_msg=name)
    if source == target:
        for got, wanted in zip(found, expected, strict=True):
            assert (got[2]["torch"] == wanted[2]["torch"]).all()
            assert got[2]["model_parallel"].keys() == wanted[2]["model_parallel"].keys()


def test_nothing_to_load_is_named(ranks, hf_folders, tmp_path):
    with pytest.raises(AssertionError, match="holds no learner state"):
        ranks.run(run, 1, hf_folders[True], LAYOUTS["one"], str(tmp_path), None)

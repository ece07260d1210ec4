"""Multi-head latent attention at every layout: what one rank computes, and the file's weights bit for bit.

That one rank computes what transformers computes is in `test_learner.py`.
"""

from __future__ import annotations

import numpy as np
import pytest

from megatron_pbsd.config import LearnerConfig, ParallelConfig
from tests.distributed.test_layouts import LOSSES, MOE, ONE
from tests.distributed.test_learner import read_tensors
from tests.distributed.training import BUDGET, OPTIMIZER, assert_same_run, train

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
    pytest.param(*case, marks=[] if case in BY_DEFAULT else pytest.mark.layouts)
    for case in ((model, layout, batching) for model in ("deepseek", "deepseek-plain")
                 for layout in PARALLEL for batching in ("packed", "padded"))])
def test_layouts(run, folders, model, layout, batching):
    found = run(model, PARALLEL[layout], batching=batching)
    assert_same_run(found, run(model)[0])
    stored = read_tensors(folders[model])
    assert set(found[0]["before"]) == set(stored)
    for name, values in stored.items():
        np.testing.assert_array_equal(found[0]["before"][name], values, err_msg=name)


@pytest.mark.layouts
@pytest.mark.parametrize("changes", [
    {"recompute": "selective"}, {"recompute": "full", "parallel": PARALLEL["tp2pp2"]},
    {"distributed_optimizer": True, "parallel": PARALLEL["tp2ep2"]}], ids=str)
def test_options_that_change_memory_do_not_change_results(run, changes):
    assert_same_run(run("deepseek", **changes), run("deepseek")[0])

"""Every layout computes what one rank computes: loss, gradient norm, log-probs and updated weights."""

from __future__ import annotations

import pytest

from megatron_pbsd.config import JSDLossConfig, LearnerConfig, ParallelConfig, PolicyLossConfig, ValueLossConfig
from tests.distributed.layouts import DENSE, MOE, ONE
from tests.distributed.training import BUDGET, LOSSES, OPTIMIZER, assert_same_run, train

WITH_MORE_OUTPUTS = {
    "ppo": PolicyLossConfig(value=ValueLossConfig()),
    "jsd": JSDLossConfig(beta=0.3),
}


@pytest.fixture(scope="module")
def run(ranks, folders):
    """(model, layout, loss, batching) → what each rank returns from `train`; each is run once."""
    made = {}

    def get(model, parallel, loss, batching):
        key = (model, parallel, loss, batching)
        if key not in made:
            settings = LearnerConfig(
                parallel=parallel, optimizer=OPTIMIZER, micro_batch_tokens=BUDGET, batching=batching)
            made[key] = ranks.run(
                train, parallel.world_size, folders[model], settings, (LOSSES | WITH_MORE_OUTPUTS)[loss])
        return made[key]

    return get


each_combination = pytest.mark.parametrize(("loss", "batching"), [
    # One of the four losses for each way of batching by default; `make test-slow` runs the others.
    pytest.param(loss, batching, marks=[] if (loss, batching) in (("pbsd", "packed"), ("gspo", "padded")) else
                 pytest.mark.slow)
    for loss in LOSSES for batching in ("packed", "padded")])


@each_combination
@pytest.mark.parametrize("layout", DENSE)
def test_dense(run, layout, loss, batching):
    assert_same_run(run("tied", DENSE[layout], loss, batching), run("tied", ONE, loss, "padded")[0])


@each_combination
@pytest.mark.parametrize("layout", MOE)
def test_mixture_of_experts(run, layout, loss, batching):
    assert_same_run(run("moe", MOE[layout], loss, batching), run("moe", ONE, loss, "padded")[0])


@pytest.mark.parametrize("parallel", [
    DENSE["tp2"], DENSE["pp2"], DENSE["dp2"],
    ParallelConfig(world_size=4, tp=2, cp=2, sequence_parallel=True)], ids=["tp2", "pp2", "dp2", "tp2cp2"])
@pytest.mark.parametrize("loss", WITH_MORE_OUTPUTS)
def test_value_head_and_candidates(run, loss, parallel):
    """What a loss may ask of the model besides log-probs: a value for each token, log-probs of other tokens."""
    assert_same_run(run("tied", parallel, loss, "packed"), run("tied", ONE, loss, "padded")[0])

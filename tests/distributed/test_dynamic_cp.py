"""Sequences that take as many data-parallel ranks as they need: the results are those of one rank."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_pbsd.batch import Batch
from megatron_pbsd.config import LearnerConfig, MoEConfig, ParallelConfig
from megatron_pbsd.learner import microbatch
from megatron_pbsd.learner.blocks import plan_blocks
from megatron_pbsd.learner.cost import Cost
from megatron_pbsd.learner.errors import LearnerError
from tests.distributed.layouts import ONE
from tests.distributed.training import BUDGET, LOSSES, OPTIMIZER, assert_same_run, learner_of, make_batch, train

pytestmark = pytest.mark.slow
LAYOUTS = {
    "dp2": (ParallelConfig(world_size=2, tp=1, dynamic_cp=True), 12, {1, 2}),
    "dp4": (ParallelConfig(world_size=4, tp=1, dynamic_cp=True), 6, {1, 2, 4}),
    "tp2dp2": (ParallelConfig(world_size=4, tp=2, dynamic_cp=True), 12, {1, 2}),
    "tp2dp2sp": (ParallelConfig(world_size=4, tp=2, dynamic_cp=True, sequence_parallel=True), 12, {1, 2}),
    "tp2etp2dp2": (ParallelConfig(world_size=4, tp=2, etp=2, dynamic_cp=True, sequence_parallel=True), 12, {1, 2}),
}
"""layout → parallel sizes, micro_batch_tokens, and the sizes of blocks that those lead to."""
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


def settings_of(layout, **changes) -> LearnerConfig:
    parallel, tokens, _ = LAYOUTS[layout]
    return LearnerConfig(parallel=parallel, optimizer=OPTIMIZER, micro_batch_tokens=tokens, **changes)


@pytest.fixture(scope="module")
def one(ranks, folders):
    """(model, loss, mixture of experts) → what one rank finds, without packing."""
    made = {}

    def get(model, loss, moe=MoEConfig()):
        if (model, loss, moe) not in made:
            settings = LearnerConfig(
                parallel=ONE, optimizer=OPTIMIZER, micro_batch_tokens=BUDGET, batching="padded", moe=moe)
            made[model, loss, moe] = ranks.run(train, 1, folders[model], settings, LOSSES[loss])[0]
        return made[model, loss, moe]

    return get


@each_layout
def test_the_tests_below_need_every_size(layout):
    parallel, tokens, sizes = LAYOUTS[layout]
    lengths = [microbatch.positions(n) for n in make_batch().lengths]
    shape = microbatch.Shape(packed=True, multiple=2 if parallel.sequence_parallel else 1)
    made = plan_blocks(lengths, parallel.dp, tokens, Cost(1.0, 0.1), shape)
    assert {share.size for rank in made.shares for share in rank if share.sequences} == sizes


@pytest.mark.parametrize("loss", ["sft", "gspo", "pbsd"])
@pytest.mark.parametrize("layout", ["dp2", "dp4", "tp2dp2", "tp2dp2sp"])
def test_dense(ranks, folders, one, layout, loss):
    settings = settings_of(layout)
    found = ranks.run(train, settings.parallel.world_size, folders["tied"], settings, LOSSES[loss])
    assert_same_run(found, one("tied", loss))


@pytest.mark.parametrize("changes", [
    {"recompute": "full"}, {"recompute": "selective"}, {"distributed_optimizer": True}], ids=str)
def test_options_that_change_memory_do_not_change_results(ranks, folders, one, changes):
    settings = settings_of("dp4", **changes)
    assert_same_run(ranks.run(train, 4, folders["tied"], settings, LOSSES["gspo"]), one("tied", "gspo"))


@pytest.mark.parametrize("layout", ["dp4", "tp2etp2dp2"])
def test_mixture_of_experts(ranks, folders, one, layout):
    moe = MoEConfig(expert_bias_update_rate=1e-3)
    settings = settings_of(layout, recompute="full", moe=moe)
    found = ranks.run(train, settings.parallel.world_size, folders["glm"], settings, LOSSES["sft"])
    assert_same_run(found, one("glm", "sft", moe))


def test_one_sequence_for_all_ranks_or_fewer(ranks, folders):
    """Ranks outside the sequence's block train on nothing."""
    alone = LearnerConfig(parallel=ONE, optimizer=OPTIMIZER, micro_batch_tokens=BUDGET)
    wanted = ranks.run(train, 1, folders["tied"], alone, LOSSES["gspo"], "load", 1)[0]
    length = microbatch.positions(make_batch(sequences=1).lengths[0])
    for tokens in (-(-length // 8) * 2, -(-length // 4) * 2):
        settings = settings_of("dp4").model_copy(update={"micro_batch_tokens": tokens})
        assert_same_run(ranks.run(train, 4, folders["tied"], settings, LOSSES["gspo"], "load", 1), wanted)


def test_a_sequence_too_long_for_all_ranks_fails_on_all_of_them(ranks, folders):
    settings = settings_of("dp2").model_copy(update={"micro_batch_tokens": 2})
    assert ranks.run(error_of_scoring, 2, folders["tied"], settings) == [
        "learner.micro_batch_tokens = 2 on each of 2 data-parallel ranks is too little for the longest sequence, of 9 "
        "positions; it must be at least 6"] * 2


def error_of_scoring(rank, rendezvous, folder, settings):
    with learner_of(rank, rendezvous, folder, settings) as learner, pytest.raises(LearnerError) as caught:
        learner.log_probs(Batch({"tokens": [np.arange(10), np.arange(3)]}))
    return str(caught.value)

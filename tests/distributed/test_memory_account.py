"""What is predicted of a learner's memory is what its ranks hold, byte for byte."""

from __future__ import annotations

import numpy as np
import pytest
from distributed.layouts import DENSE, MOE, ONE

from megatron_pbsd import losses
from megatron_pbsd.batch import Batch
from megatron_pbsd.config import LearnerConfig, ModelConfig, OptimizerConfig, SFTConfig, TransportConfig
from megatron_pbsd.config.losses import ValueLossConfig
from megatron_pbsd.memory_account import STEP, learner_bytes, moving_bytes
from megatron_pbsd.models import family, hf_config
from megatron_pbsd.platform.cpu import Cpu


def settings(parallel, **changes):
    return LearnerConfig(parallel=parallel, optimizer=OptimizerConfig(lr=1e-2, warmup_steps=1), micro_batch_tokens=48,
                         **changes)


def hold(rank, rendezvous, folder, config, value_head):
    """What a rank holds after a step, by category, and what is published."""
    from megatron_pbsd.learner.learner import Learner
    from megatron_pbsd.resharding.manifest import layout

    section = losses.build(SFTConfig())
    if value_head:
        from distributed.training import POLICY

        section = losses.build(POLICY.model_copy(update={"value": VALUE}))
    learner = Learner(rank, rendezvous, ModelConfig(path=str(folder)), config, section, seed=3, total_steps=10)
    try:
        rng = np.random.default_rng(0)
        tokens = [rng.integers(0, 64, 12) for _ in range(4)]
        ones = [np.ones(12, np.float32) for _ in tokens]
        columns = {"tokens": tokens, "loss_mask": ones} | {name: ones for name in section.fields}
        learner.step(Batch(columns))
        return learner._memory.account(), layout("", learner.tensors()).nbytes
    finally:
        learner.close()


VALUE = ValueLossConfig()
SHARDED = {"distributed_optimizer": True}
BFLOAT16 = {"precision": "bfloat16"}
CASES = {
    "plain": ("tied", ONE, {}, False),
    "bfloat16": ("tied", ONE, BFLOAT16, False),
    "sharded": ("odd", ONE, SHARDED, False),
    "value head": ("untied", ONE, SHARDED, True),
    "tp2pp2": ("odd", DENSE["tp2pp2"], {}, False),
    "tied pp2 sharded": ("odd", DENSE["pp2"], SHARDED | BFLOAT16, False),
    "pp2vpp2 value head": ("tied", DENSE["pp2vpp2"], SHARDED, True),
    "dp2": ("untied", DENSE["dp2"], {}, False),
    "dp2 sharded": ("untied", DENSE["dp2"], SHARDED | BFLOAT16, False),
    "pp2dp2 sharded": ("tied", DENSE["pp2dp2"], SHARDED, False),
    "cp2 sharded": ("untied", DENSE["cp2"], SHARDED, False),
    "experts": ("moe", ONE, BFLOAT16, False),
    "ep2": ("glm", MOE["ep2"], SHARDED | BFLOAT16, False),
    "tp2ep2": ("moe", MOE["tp2ep2"], SHARDED, False),
    "ep2etp2": ("deepseek", MOE["ep2etp2"], {}, False),
}
DEFAULT = ("sharded", "tied pp2 sharded", "tp2ep2")


@pytest.mark.parametrize("case", [
    pytest.param(name, marks=() if name in DEFAULT else pytest.mark.slow, id=name.replace(" ", "-"))
    for name in CASES])
def test_ranks_hold_what_was_predicted(ranks, folders, case):
    model, parallel, changes, value_head = CASES[case]
    config, hf = settings(parallel, **changes), hf_config.read(folders[model])
    predicted = learner_bytes(hf, config, Cpu(), value_head)
    found = ranks.run(hold, parallel.world_size, folders[model], config, value_head)
    for category in ("parameters", "gradients"):
        assert [rank[category] for rank in predicted] == [held[category] for held, _ in found], category
    divides = config.distributed_optimizer and parallel.world_size > 1
    for category in ("master_weights", "optimizer_state"):
        ours, theirs = ([rank[category] for rank in of] for of in (predicted, [held for held, _ in found]))
        if not divides:
            assert ours == theirs, category
        else:
            # A rank counts the steps of the parameters that it has a part of; predicted are those of all.
            tensors = len(family(hf).hf_tensors(hf)) * parallel.world_size
            spare = STEP * tensors if category == "optimizer_state" else 0
            assert 0 <= sum(ours) - sum(theirs) <= spare, category
    assert {published for _, published in found} == {
        moving_bytes(hf, config, TransportConfig(), Cpu())}

"""What the bench of a save's stall measures, at a toy size."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.bench.checkpoint_stall import MODEL, measure
from megatron_pbsd.config import LearnerConfig, ParallelConfig
from megatron_pbsd.controller.inline import InlineRuntime

TINY = MODEL | {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}


def measured(rank, rendezvous, folder):
    settings = LearnerConfig(parallel=ParallelConfig(world_size=1, tp=1), micro_batch_tokens=1024)
    return measure(InlineRuntime(), settings, TINY, Path(folder), pairs=1)


def test_a_save_is_measured_waited_for_and_not(ranks, tmp_path):
    (found,) = ranks.run(measured, 1, str(tmp_path))
    parameters = 64 * 32 + 2 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48 + 2 * 32 + 2 * 8) + 32
    assert found["written_gb"] * 1e9 >= 3 * 4 * parameters
    stall_s = found["call_s"] + found["copy_wait_s"]
    assert found["stall_ratio"] == pytest.approx(stall_s / found["blocking_s"], rel=0.2)
    assert min(found["blocking_s"], found["step_s"], found["step_while_saving_s"]) > 0
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]

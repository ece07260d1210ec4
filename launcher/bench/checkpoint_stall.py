"""For how long a checkpoint keeps the learner from training: one that is written while it trains on, beside one that it
waits for.

blocking_s           seconds until a checkpoint's parts are on disk, synced: median
call_s, copy_wait_s  of a save that is not waited for: until the call returns, and for which the next optimizer step
                     waits for the copy of what it changes: medians
stall_ratio          their sum over blocking_s: median of pairs
step_s               a step with nothing else going on; step_while_saving_s: one during which a checkpoint is written
written_gb           parameters and Adam's moments

The model has 0.1 billion random parameters, in one process unless `overrides` change the layout and the runtime; a step
reads `TOKENS` tokens on every data-parallel rank, few beside those of a real one.
"""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from launcher.overrides import load_config
from megatron_pbsd import losses
from megatron_pbsd.batch import Batch
from megatron_pbsd.components import build_learner
from megatron_pbsd.config import LearnerConfig, ModelConfig, SFTConfig
from megatron_pbsd.controller.runtime import Runtime, open_runtime
from megatron_pbsd.learner.group import LearnerGroup

CONFIG = Path("configs/quickstart.yaml")
ALONE = ("--runtime", "inline", "--learner.parallel.world_size", "1", "--learner.parallel.tp", "1")
MODEL = {
    "model_type": "qwen3", "vocab_size": 32_000, "hidden_size": 768, "intermediate_size": 2304,
    "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 64,
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "initializer_range": 0.02, "tie_word_embeddings": True,
    "hidden_act": "silu", "attention_bias": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
TOKENS, SEQUENCE = 1024, 256
PAIRS = 3


def run(overrides: Sequence[str] = ()) -> dict[str, Any]:
    config = load_config(CONFIG, [*ALONE, *overrides])
    with tempfile.TemporaryDirectory(prefix="pbsd-bench-") as folder:
        with open_runtime(config.runtime, Path(folder) / "logs", config.ray_port) as runtime:
            return measure(runtime, config.learner, MODEL, Path(folder), PAIRS)


def measure(
    runtime: Runtime, settings: LearnerConfig, model: dict[str, Any], folder: Path, pairs: int
) -> dict[str, Any]:
    """`folder`: for the model's configuration and the checkpoints."""
    (folder / "config.json").write_text(json.dumps(model))
    learner = LearnerGroup.spawn(
        runtime, build_learner, world_size=settings.parallel.world_size, deadline_s=settings.deadline_s,
        model=ModelConfig(path=str(folder), initial_weights="random"), config=settings, loss=losses.build(SFTConfig()),
        seed=0, total_steps=100)
    learner.ready()
    try:
        batch = _batch(model["vocab_size"], settings.parallel.dp * TOKENS // SEQUENCE)
        # The first step makes Adam's moments, the first save the memory for copies.
        learner.step(batch)
        _save(learner, folder / "checkpoint", batch)
        found = [_pair(learner, folder / "checkpoint", batch) for _ in range(pairs)]
    finally:
        learner.close()
    medians = {name: statistics.median(one[name] for one in found) for name in found[0]}
    return {name: round(value, 4) for name, value in medians.items()}


def _pair(learner: LearnerGroup, folder: Path, batch: Batch) -> dict[str, float]:
    began = time.perf_counter()
    learner.save(str(folder), wait=True)
    blocking_s, written = time.perf_counter() - began, sum(path.stat().st_size for path in folder.iterdir())
    shutil.rmtree(folder)
    began = time.perf_counter()
    learner.step(batch)
    step_s = time.perf_counter() - began
    during = _save(learner, folder, batch)
    stall_s = during["call_s"] + during["copy_wait_s"]
    return {"stall_ratio": stall_s / blocking_s, "blocking_s": blocking_s, **during, "step_s": step_s,
            "written_gb": written / 1e9}


def _save(learner: LearnerGroup, folder: Path, batch: Batch) -> dict[str, float]:
    """A save during which the learner goes on."""
    began = time.perf_counter()
    learner.save(str(folder), wait=False)
    called = time.perf_counter()
    learner.step(batch)
    stepped = time.perf_counter()
    waited_s = max(learner.call("copy_wait_s"))
    learner.saved()
    shutil.rmtree(folder)
    return {"call_s": called - began, "copy_wait_s": waited_s, "step_while_saving_s": stepped - called}


def _batch(vocabulary: int, sequences: int) -> Batch:
    rng = np.random.default_rng(0)
    tokens = [rng.integers(0, vocabulary, SEQUENCE) for _ in range(sequences)]
    return Batch({"tokens": tokens, "loss_mask": [np.ones(SEQUENCE, np.float32) for _ in tokens]})

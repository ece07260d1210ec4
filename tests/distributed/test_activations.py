"""What the planner says of a learner rank: what it keeps of its forward pass is what autograd keeps of a real one, and
what a step takes is what the system counts."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest
import torch
from distributed.layouts import ONE
from tiny_models import make_tiny

from megatron_pbsd import losses
from megatron_pbsd.batch import Batch
from megatron_pbsd.config import LearnerConfig, ModelConfig, ParallelConfig, SFTConfig
from megatron_pbsd.models import family, hf_config
from megatron_pbsd.planning.activations import Kernels
from megatron_pbsd.planning.memory import Layout, Numerics, learner_bytes, passing_bytes, stages

TOKENS, VOCABULARY = 256, 64
CPU = Numerics(parameter=4, master=0, divided=False, kernels=Kernels(width=4, fused=False))


class Saved:
    """Storages that autograd has saved for a backward pass, until it begins: each once, without parameters."""

    def __init__(self, parameters):
        self.parameters = {p.untyped_storage().data_ptr() for p in parameters}
        self.tensors, self.forward = [], True

    def pack(self, tensor):
        if self.forward:
            self.tensors.append(tensor)
        return tensor

    def unpack(self, tensor):
        self.forward = False
        return tensor

    def nbytes(self):
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self.tensors}
        return sum(nbytes for place, nbytes in storages.items() if place not in self.parameters)


def saved(rank, rendezvous, folder, config):
    """Bytes that a step on one micro-batch of one sequence saves."""
    from megatron_pbsd.learner.learner import Learner

    learner = Learner(rank, rendezvous, ModelConfig(path=str(folder)), config, losses.build(SFTConfig()), seed=3,
                      total_steps=10)
    try:
        rng = np.random.default_rng(0)
        batch = Batch({"tokens": [rng.integers(0, VOCABULARY, TOKENS + 1)],
                       "loss_mask": [np.ones(TOKENS + 1, np.float32)]})
        found = Saved([p for chunk in learner._chunks for p in (*chunk.parameters(), *chunk.buffers())])
        with torch.autograd.graph.saved_tensors_hooks(found.pack, found.unpack):
            learner.step(batch)
        return found.nbytes()
    finally:
        learner.close()


def predicted(folder, config):
    """Of each rank, which all are of one pipeline stage."""
    hf = hf_config.read(folder)
    decoder, parallel = family(hf).decoder(hf), config.parallel
    layout = Layout(parallel, TOKENS, config.recompute, 1024, parallel.tp > 1)
    return sum(passing_bytes(decoder, layout, CPU, stages(decoder, parallel)[0], 1)[part]
               for part in ("activations", "logits"))


CASES = {
    "dense": ("qwen3", ONE, "none"),
    "llama": ("llama", ONE, "none"),
    "dense, selective": ("qwen3", ONE, "selective"),
    "dense, full": ("qwen3", ONE, "full"),
    "experts": ("qwen3_moe", ONE, "none"),
    "latent": ("deepseek_v3", ONE, "none"),
    "latent, full": ("deepseek_v3", ONE, "full"),
    "dense, tp2": ("qwen3", ParallelConfig(world_size=2, tp=2, sequence_parallel=True), "none"),
    "latent, tp2": ("deepseek_v3", ParallelConfig(world_size=2, tp=2), "none"),
    "experts, tp2ep2": ("qwen3_moe", ParallelConfig(world_size=2, tp=2, ep=2), "none"),
    "experts, etp2": ("qwen3_moe", ParallelConfig(world_size=2, tp=2, etp=2), "none"),
}
SIZES = {"hidden_size": 64, "num_hidden_layers": 6, "vocab_size": VOCABULARY, "max_position_embeddings": 512}
INNER = {"llama": {"intermediate_size": 160}, "qwen3": {"intermediate_size": 160},
         "qwen3_moe": {"moe_intermediate_size": 48, "mlp_only_layers": []},
         "deepseek_v3": {"moe_intermediate_size": 48}}


@pytest.mark.parametrize("case", CASES)
def test_a_rank_keeps_what_was_predicted(ranks, tmp_path, case):
    """Over all ranks, within ten per cent: routers send a rank more tokens or fewer."""
    model_type, parallel, recompute = CASES[case]
    make_tiny(model_type, tmp_path, **SIZES | INNER[model_type])
    config = LearnerConfig(parallel=parallel, micro_batch_tokens=TOKENS, recompute=recompute)
    found = ranks.run(saved, parallel.world_size, tmp_path, config)
    assert np.mean(found) == pytest.approx(predicted(tmp_path, config), rel=0.1)


M_MMAP_THRESHOLD = -3
"""Of mallopt(3)."""
LONG = 2048
LARGE = {"hidden_size": 256, "num_hidden_layers": 8, "num_attention_heads": 8, "head_dim": 32,
         "vocab_size": LONG, "max_position_embeddings": LONG}


def peak(rank, rendezvous, folder, config):
    """Bytes that a rank has at the height of a step: what it holds, and by how much its memory grows, as the system
    counts both."""
    from megatron_pbsd.learner.learner import Learner

    # glibc would keep what it is given back, and use it again without the system seeing it.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)
    learner = Learner(rank, rendezvous, ModelConfig(path=str(folder)), config, losses.build(SFTConfig()), seed=3,
                      total_steps=10)
    try:
        batch = Batch({"tokens": [np.random.default_rng(0).integers(0, LONG, LONG + 1)],
                       "loss_mask": [np.ones(LONG + 1, np.float32)]})
        learner.step(batch)
        Path("/proc/self/clear_refs").write_text("5")  # the height is measured anew
        before = resident("VmRSS")
        learner.step(batch)
        return sum(learner._memory.account().values()) + resident("VmHWM") - before
    finally:
        learner.close()


def resident(which):
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[which].split()[0]) * 1024


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "recompute"), [("qwen3", "none"), ("qwen3", "full"), ("qwen3_moe", "none")])
def test_a_step_takes_what_was_planned(ranks, tmp_path, model_type, recompute):
    """Parameters, gradients, optimizer, activations, logits and what backward passes work with, within ten per cent."""
    inner = {"qwen3": {"intermediate_size": 768, "num_key_value_heads": 4},
             "qwen3_moe": {"moe_intermediate_size": 256, "mlp_only_layers": [], "num_key_value_heads": 4}}
    make_tiny(model_type, tmp_path, **LARGE | inner[model_type])
    config = LearnerConfig(parallel=ONE, micro_batch_tokens=LONG, recompute=recompute)
    hf = hf_config.read(tmp_path)
    (planned,) = learner_bytes(family(hf).decoder(hf), Layout(ONE, LONG, recompute), CPU, 1)
    assert ranks.run(peak, 1, tmp_path, config) == [pytest.approx(sum(planned.values()), rel=0.1)]

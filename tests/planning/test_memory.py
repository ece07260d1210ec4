"""Bytes of planned GPUs against those that the account of a run has for each rank, and against published runs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from launcher.bench.planning import layouts, megatron, needed_gb, recipes
from launcher.published_layouts import KIMI_K2, QWEN3_8B, QWEN3_30B
from launcher.published_runs import DEEPSEEK_V3, hagemann
from megatron_pbsd import memory_account
from megatron_pbsd.config import LearnerConfig, ParallelConfig
from megatron_pbsd.models import family
from megatron_pbsd.models.footprint import server_kv, server_numbers
from megatron_pbsd.models.parameters import coordinates
from megatron_pbsd.models.sglang import ServerParallel
from megatron_pbsd.planning.hardware import Cluster, gpu
from megatron_pbsd.planning.memory import Layout, Numerics, passing_bytes, sglang_engine, stages, state_bytes

GPU = SimpleNamespace(name="cuda", distributed_optimizer=True, dtype=lambda precision: torch.bfloat16)


@pytest.mark.parametrize(("hf", "sizes"), [
    (QWEN3_8B, {"world_size": 16, "tp": 2, "pp": 4}), (QWEN3_30B, {"world_size": 32, "tp": 2, "pp": 2, "ep": 8}),
    (KIMI_K2, {"world_size": 256, "tp": 8, "pp": 8, "ep": 32}),
])
def test_states_are_those_of_the_account(hf, sizes):
    parallel, decoder = ParallelConfig(**sizes), family(hf).decoder(hf)
    account = memory_account.learner_bytes(hf, LearnerConfig(parallel=parallel), GPU, False)
    planned = {stage.index: state_bytes(decoder, parallel, Numerics(), stage.index)
               for stage in stages(decoder, parallel)}
    for rank, held in enumerate(account):
        if (stage := coordinates(parallel, rank).pp) in planned:
            assert held == pytest.approx(planned[stage], rel=1e-9)


def test_later_stages_have_no_more_than_the_first_of_their_kind():
    decoder = family(KIMI_K2).decoder(KIMI_K2)
    for sizes in ({"pp": 8}, {"pp": 16, "vpp": 2}, {"pp": 16}):
        parallel = ParallelConfig(world_size=128, tp=8, **sizes)
        layout = Layout(parallel, 4096, "none", 1024, True)
        chosen = stages(decoder, parallel)
        most = max(sum(passing_bytes(decoder, layout, Numerics(), stage, 64).values()) for stage in chosen)
        for stage in chosen:
            for later in range(stage.index, parallel.pp):
                other = type(stage)(later, stage.chunks, stage.last)
                assert sum(passing_bytes(decoder, layout, Numerics(), other, 64).values()) <= most


def test_an_engine_takes_what_sglang_gives_it():
    decoder, h100 = family(QWEN3_30B).decoder(QWEN3_30B), gpu("h100-80g")
    server = ServerParallel(4)
    engine = sglang_engine(decoder, server, {"mem_fraction_static": 0.8}, h100, 256, 2)
    assert engine.held["weights"] == 2 * server_numbers(decoder, server)
    assert sum(engine.held.values()) == pytest.approx(0.8 * h100.memory)
    assert engine.held["kv_cache"] == pytest.approx(engine.kv_tokens * 2 * server_kv(decoder, server))
    asked = sglang_engine(decoder, server, {"max_total_tokens": 1000}, h100, 256, 2)
    # Four key-value heads, one on each rank, of 48 layers.
    assert asked.held["kv_cache"] == 1000 * 2 * 48 * 2 * 128 and asked.graphs == 256 * 2 * 2**20


def test_replicas_of_attention_have_kv_of_their_own():
    """Of DeepSeek-V3 every rank keeps all of a token's latents; of a replica's neighbours that is a copy each."""
    decoder, h100 = family(DEEPSEEK_V3).decoder(DEEPSEEK_V3), gpu("h100-80g")
    one, eight = (sglang_engine(decoder, ServerParallel(64, 64, dp_attention=replicas), {"max_total_tokens": 1000},
                                h100, 128, 2) for replicas in (1, 8))
    assert one.held["kv_cache"] == eight.held["kv_cache"] == 1000 * 2 * 61 * (512 + 64)
    assert (one.kv_tokens, eight.kv_tokens, one.replicas, eight.replicas) == (1000, 1000, 1, 8)
    # The embedding is whole with replicas, and of the heads' projections each rank has eight times as much.
    heads = 61 * (1536 * 128 * 192 + 512 * 128 * 256 + 128 * 128 * 7168)
    more = heads * (1 / 8 - 1 / 64) + 129280 * 7168 * (1 - 1 / 64)
    assert eight.held["weights"] - one.held["weights"] == pytest.approx(2 * more, rel=1e-3)
    assert eight.graphs == 13 * one.graphs == 128 * 26 * 2**20


def test_published_layouts_fit_or_not_as_they_did():
    """Of 191 layouts of Llama on A100s one that ran is said not to fit, and 21 that did not are said to."""
    rows = layouts()
    assert sum(row["layouts"] for row in rows) == 191
    assert sum(row["said_not_to_fit_did"] for row in rows) <= 1
    assert sum(row["said_to_fit_did_not"] for row in rows) <= 21
    best = max((run for run in hagemann() if run.fits), key=lambda run: run.mfu)
    assert 60 < needed_gb(best) < Cluster(gpu("a100-80g"), 1).available / 1e9


def test_published_times_are_near():
    for row in megatron():
        if "predicted_s" in row:
            assert row["predicted_s"] == pytest.approx(row["measured_s"], rel=0.2), row
        else:
            assert row["predicted"] == pytest.approx(row["measured"], rel=0.15), row


def test_recipes_of_peers_fit():
    assert all(row["gb"] < row["room_gb"] for row in recipes())
    needing = {row["recipe"] for row in recipes() if row["gb_with_optimizer"] > row["room_gb"]}
    assert needing == {"slime run-deepseek-r1", "slime run-kimi-k2-Instruct"}

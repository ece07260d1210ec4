"""A server whose two processes each have all of attention, for half of the requests, and half of the experts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from safetensors.torch import load_file
from sglang_server.servers import ARGS, DIVIDED, ENVIRONMENT, start
from sglang_server.test_protocol import (  # noqa: F401  of the protocol's suite
    chunk,
    drain,
    engine,
    greedy,
    model,
    restored,
    tensors,
    test_a_divided_request_continues,
    test_greedy_equals_generate,
    test_log_probs_are_of_temperature_1_and_equal_a_full_forward,
    test_new_weights_change_tokens_as_in_transformers,
    test_routed_experts_are_those_of_transformers,
    test_running_chunks_continue_under_new_weights,
    test_samples_depend_on_seed_and_request_alone,
    test_score_equals_a_full_forward,
    with_weights,
)
from sglang_server.test_transports import fewest, log_probs, other, world_of

from megatron_pbsd.models.sglang import server_of
from megatron_pbsd.resharding.broadcast import CollectiveTransport
from megatron_pbsd.resharding.checksum import checksum
from megatron_pbsd.resharding.disk import DiskTransport
from megatron_pbsd.resharding.transport import BucketsTransport, SegmentTransport
from megatron_pbsd.rollout.engines.sglang.weights import payload, where

KV_TOKENS = 4096


@pytest.fixture(scope="module")
def case(models, tmp_path_factory):
    """It takes two cores to wait, and does not outlive these tests."""
    started = start(models["moe"], tmp_path_factory.mktemp("logs"), routed_experts=True,
                    args=ARGS | DIVIDED["replicas"] | {"max_total_tokens": KV_TOKENS},
                    environment=ENVIRONMENT | {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"})
    yield started, "moe"
    started.close()


def test_a_chunk_runs_where_its_kv_is(engine):  # noqa: F811
    """Which is not where the next free slot is."""
    first = [chunk(range(start, start + 20), 10) for start in (2, 30)]
    engine.submit(first)
    placed = {flight.chunk.request_id: flight.replica for flight in engine._flights.values()}
    assert sorted(placed.values()) == [0, 1]
    results = drain(engine)
    engine.submit([replace(each, tokens=each.tokens + results[each.request_id].tokens) for each in reversed(first)])
    assert placed == {flight.chunk.request_id: flight.replica for flight in engine._flights.values()}
    assert [result.cached_tokens for result in drain(engine).values()] == [29, 29]
    assert engine.statistics().kv_tokens == 2 * KV_TOKENS


def test_a_chunk_is_aborted_wherever_it_runs(engine, model):  # noqa: F811
    chunks = [chunk(range(start, start + 20), 90) for start in (2, 30)]
    engine.submit(chunks)
    for each in chunks:
        engine.abort([each.request_id])
    for each, result in zip(chunks, drain(engine).values(), strict=True):
        assert result.finish_reason == "abort" and len(result.tokens) < 90
        assert result.tokens == greedy(model, each.tokens, 1 + len(result.tokens))[:-1]


def test_a_replica_with_other_weights_is_told(engine, tensors, publish, restored):  # noqa: F811
    name = "model.layers.0.self_attn.q_proj.weight"
    given = [publish({name: tensors[name]}), publish({name: tensors[name] + 1})]
    with engine._weights._session(busy=False), engine._weights._folder() as folder:
        engine._server.post("/update_weights_from_tensor", {
            "serialized_named_tensors": [payload({**where(each), "report": str(folder / "rank")}) for each in given],
            "load_format": "pbsd_weights.take", "selector": "target", "flush_cache": True})
    held = engine.checksums()
    assert held.pop(name) == "ranks 0 and 1 have different versions of the same part"
    assert held == {other: checksum(tensor) for other, tensor in tensors.items() if other != name}


@pytest.mark.parametrize("kind", [SegmentTransport, BucketsTransport, CollectiveTransport, DiskTransport])
def test_each_replica_takes_attention_and_no_more_than_it_lacks(engine, models, tmp_path, kind):  # noqa: F811
    path = models["moe"]
    with world_of(engine, path, 2) as (learner, _, weights, transport):
        learner.take(changed := other(weights, seed=5))
        version = engine.statistics().version + 1
        expected = {name: checksum(tensor) for name, tensor in changed.items()}
        assert transport(kind, tmp_path).send(version, ["engine-0"]) == expected == engine.checksums()
        assert engine._weights.taken == fewest(path, server_of(DIVIDED["replicas"]))
        attention = sum(tensor.nbytes for name, tensor in load_file(path / "model.safetensors").items()
                        if ".self_attn." in name)
        assert min(engine._weights.taken) > attention
        (scores,) = engine.score([tuple(range(3, 20))])
        np.testing.assert_allclose(scores[1:], log_probs(path, changed, tmp_path), atol=1e-5)

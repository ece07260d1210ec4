"""What the embedded engine gives away, it does not hold."""

from __future__ import annotations

from dataclasses import replace
from itertools import count

import pytest
import torch
from engine_sleep import *  # noqa: F403  the tests that every engine passes
from engine_sleep import asked, finished
from safetensors.torch import load_file

from megatron_pbsd.resharding.shared_folder import SharedFolder
from megatron_pbsd.rollout.engines.embedded.kv_pool import PoolPlace
from megatron_pbsd.rollout.engines.protocol import MEMORY_TAGS


@pytest.fixture
def engine(make_engine):
    return make_engine(name="engine-0", max_context=128)


@pytest.fixture
def model(reference):
    return reference()


@pytest.fixture
def tensors(folders):
    return load_file(folders["qwen3"] / "model.safetensors")


@pytest.fixture
def restored():
    return count(1)


def storages(tensors) -> int:
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def test_memory_is_gone_and_comes_back_empty(make_engine, folders, publish, family):
    """Latent attention, experts and tied embeddings included."""
    with SharedFolder() as pool:
        engine = make_engine(family, slots=2, kv_pool=PoolPlace(pool.path, 1 << 24, shared=True))
        chunks = [asked(range(5, 30 + i), 8) for i in range(3)]
        engine.submit(chunks)
        tokens = {result.request_id: result.tokens for result in finished(engine)}
        kv, weights = engine._cache.nbytes, storages(engine._model.module.parameters())
        assert engine.statistics().kv.bytes > 0 and kv > 0 and weights > 0
        engine.sleep(["kv_cache"])
        assert engine._cache.nbytes == 0 == engine.statistics().kv.bytes == engine.statistics().cached_requests
        assert storages(engine._model.module.parameters()) == weights
        engine.sleep(["weights"])
        assert storages(engine._model.module.parameters()) == 0
        engine.wake(MEMORY_TAGS)
        assert (engine._cache.nbytes, storages(engine._model.module.parameters())) == (kv, weights)
        assert not any(tensor.any() for tensor in (*engine._cache.keys, *engine._cache.values))
        engine.update_weights(publish(load_file(folders[family] / "model.safetensors")), 1)
        engine.submit(chunks)
        results = finished(engine)
        assert {result.request_id: result.tokens for result in results} == tokens


def test_recorded_experts_sleep_with_the_cache(make_engine):
    engine = make_engine("qwen3_moe", slots=2)
    request = torch.arange(20).tolist()

    def experts(name):
        engine.submit([replace(asked(request, 6, name), routed_from=0)])
        return finished(engine)[0].routed_experts

    before = experts("a")
    engine.sleep(["kv_cache"])
    assert engine._cache.nbytes == 0
    engine.wake(["kv_cache"])
    assert (experts("a") == before).all()

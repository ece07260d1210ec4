from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megatron_pbsd.resharding.checksum import checksum
from megatron_pbsd.resharding.shared_memory import attach
from megatron_pbsd.rollout.engines.protocol import Chunk, EngineError
from megatron_pbsd.trajectory import VersionSpan


def checkpoint(folders, family: str = "qwen3") -> dict[str, torch.Tensor]:
    return load_file(folders[family] / "model.safetensors")


def changed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(9)
    return {n: t + 0.05 * torch.randn(t.shape, generator=generator) for n, t in tensors.items()}


def greedy(engine, name: str) -> tuple[int, ...]:
    engine.submit([Chunk(name, tuple(range(30)), 12, seed=0, temperature=0.0)])
    return engine.collect()[0].tokens


def test_checksums_are_those_of_the_checkpoint(make_engine, folders, family):
    expected = {name: checksum(tensor) for name, tensor in checkpoint(folders, family).items()}
    assert make_engine(family).checksums() == expected


def test_an_engine_without_weights_waits_for_the_same_tensors(make_engine, folders, publish, family):
    engine = make_engine(family, load_weights=False)
    engine.update_weights(publish(checkpoint(folders, family)), version=1)
    assert engine.checksums() == make_engine(family).checksums()
    assert greedy(engine, "r") == greedy(make_engine(family), "r")


def test_update_in_place(make_engine, folders, reference, publish, family):
    engine, model = make_engine(family), reference(family)
    before = greedy(engine, "r")
    tensors = changed(checkpoint(folders, family))
    engine.update_weights(publish(tensors), version=3)
    assert engine.checksums() == {name: checksum(tensor) for name, tensor in tensors.items()}
    assert engine.statistics().version == 3 and engine.statistics().cached_requests == 0
    engine.submit([Chunk("r", tuple(range(30)), 12, seed=0, temperature=0.0)])
    (result,) = engine.collect()
    assert result.cached_tokens == 0 and result.versions == (VersionSpan(3, 0, 12),)
    assert result.tokens != before
    engine.update_weights(publish(checkpoint(folders, family)), version=4)
    assert greedy(engine, "again") == before
    score = engine.score([range(20)])[0]
    with torch.no_grad():
        log_probs = torch.log_softmax(model(torch.arange(20)[None]).logits[0], -1)
    np.testing.assert_allclose(score[1:], log_probs.numpy()[np.arange(19), np.arange(1, 20)], atol=1e-5)


def test_running_chunk_continues_under_the_new_weights(make_engine, folders, publish):
    engine = make_engine(slots=2)
    engine.submit([Chunk("short", (1, 2), 4, seed=0), Chunk("long", (3, 4, 5), 10, seed=0)])
    engine.collect()
    engine.update_weights(publish(changed(checkpoint(folders))), version=7)
    (result,) = engine.collect()
    assert result.versions == (VersionSpan(0, 0, 4), VersionSpan(7, 4, 10))
    context = (3, 4, 5) + result.tokens
    np.testing.assert_allclose(result.log_probs[4:], engine.score([context])[0][7:], atol=1e-5)


def test_errors_name_the_tensor_and_change_nothing(make_engine, folders, publish):
    engine, tensors = make_engine(), checkpoint(folders)
    before = engine.checksums()
    name = "model.layers.0.self_attn.q_proj.weight"
    renamed = {n.replace("q_proj.", "q_projection."): t for n, t in tensors.items()}
    cases = {
        f"{name}' is missing": {n: t for n, t in changed(tensors).items() if n != name},
        "lm_head.weight' is not a parameter": changed(tensors) | {"lm_head.weight": torch.zeros(96, 64)},
        rf"{name}' is float32\[64, 63\], expected float32\[64, 64\]": changed(tensors) | {name: torch.zeros(64, 63)},
        rf"{name}' is bfloat16\[64, 64\], expected float32": changed(tensors) | {name: torch.zeros(64, 64).bfloat16()},
        f"{name}' is missing.*nearest.*layers.0.self_attn.q_projection": renamed,
    }
    for message, published in cases.items():
        with pytest.raises(EngineError, match=f"test-engine.*version 1.*{message}"):
            engine.update_weights(publish(published), version=1)
    manifest = publish(tensors)
    with pytest.raises(EngineError, match="'absent' does not exist"):
        engine.update_weights(replace(manifest, segment="absent"), version=1)
    short = publish({"tiny": torch.zeros(1)})
    with pytest.raises(EngineError, match=f"{short.segment}.*bytes, expected {manifest.nbytes}"):
        engine.update_weights(replace(manifest, segment=short.segment), version=1)
    assert engine.checksums() == before and engine.statistics().version == 0


def test_segment_survives_the_exit_of_a_process_that_read_it(publish):
    manifest = publish({"w": torch.arange(4.0)})
    script = (
        "import sys, torch\n"
        "from megatron_pbsd.resharding.manifest import layout\n"
        "from megatron_pbsd.resharding.shared_memory import attach\n"
        "from megatron_pbsd.rollout.engines.embedded.weights import copy_into\n"
        "w = torch.zeros(4)\n"
        "copy_into(attach(layout(sys.argv[1], {'w': ('float32', (4,))})), {'w': w})\n"
        "assert w.tolist() == [0, 1, 2, 3]\n"
    )
    subprocess.run([sys.executable, "-c", script, manifest.segment], check=True)
    assert attach(manifest)["w"].tolist() == [0, 1, 2, 3]


def test_nan_weights_are_reported_with_the_request_and_leave_no_trace(make_engine, folders, publish):
    engine = make_engine(slots=1)
    before = greedy(engine, "r")
    broken = {name: torch.full_like(tensor, torch.nan) for name, tensor in checkpoint(folders).items()}
    engine.update_weights(publish(broken), version=1)
    engine.submit([Chunk("victim", (1, 2), 3, seed=0)])
    with pytest.raises(EngineError, match="not finite.*victim"):
        engine.collect()
    engine.abort(["victim"])
    engine.collect()
    engine.update_weights(publish(checkpoint(folders)), version=2)
    assert greedy(engine, "r") == before

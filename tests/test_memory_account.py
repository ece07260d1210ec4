"""Predicted bytes against those that engines hold, and what is said when a run uses others."""

from __future__ import annotations

import json
from math import prod
from types import SimpleNamespace

import pytest
import torch
from synthetic_run import run_config
from tiny_models import make_tiny

from launcher.cli import main
from megatron_pbsd.memory_account import Account, Phase, engine_bytes, predict
from megatron_pbsd.memory_meter import MemoryMeter
from megatron_pbsd.models import family, hf_config
from megatron_pbsd.platform.cpu import Cpu
from megatron_pbsd.platform.usage import MemoryUse, of_process, total
from megatron_pbsd.rollout.engines.embedded.engine import EmbeddedEngine
from megatron_pbsd.rollout.engines.protocol import MEMORY_TAGS, Chunk

GB = 10**9


def config(folder, **sections):
    return run_config(model={"path": str(folder)}, **sections)


@pytest.mark.parametrize("model_type", ["qwen3", "qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize(("slots", "context"), [(3, 100), (2, 128)])
def test_an_embedded_engine_holds_what_was_predicted(tmp_path, model_type, slots, context):
    make_tiny(model_type, tmp_path)
    hf, experts = hf_config.read(tmp_path), model_type != "qwen3"
    run = config(tmp_path, rollout={"slots": slots, "max_context": context}, learner={"moe": {
        "routing_replay": experts}})
    predicted, unknown = engine_bytes(hf, run, Cpu())
    engine = EmbeddedEngine(str(tmp_path), name="engine-0", slots=slots, max_context=context)
    engine.submit([Chunk("r", (1, 2, 3), 4, seed=0, routed_from=0 if experts else None)])
    engine.collect()
    assert engine.memory().held == predicted and unknown == {}
    engine.sleep(["kv_cache"])
    assert engine.memory().held == predicted | {"kv_cache": 0}
    engine.sleep(MEMORY_TAGS)
    assert engine.memory().held == {"weights": 0, "kv_cache": 0}


def test_servers_hold_their_shares_and_what_is_copied(tmp_path):
    """Key-value heads fewer than ranks are there twice; norms and routers on each rank."""
    make_tiny("qwen3", tmp_path, vocab_size=64)
    hf = hf_config.read(tmp_path)

    def bytes_of(**args):
        run = config(tmp_path, rollout={"engine": "sglang", "sglang": {"python": "python", "args": args}})
        return engine_bytes(hf, run, Cpu())

    one, _ = bytes_of(max_total_tokens=100)
    tensors = 4 * sum(map(prod, family(hf).hf_tensors(hf).values()))
    assert one == {"weights": tensors, "kv_cache": 100 * 4 * 4 * 2 * 2 * 16}
    four, unknown = bytes_of(tp_size=4)
    norms = 4 * (9 * 32 + 8 * 16)
    keys = 4 * 4 * 2 * 2 * 16 * 32
    assert four == {"weights": tensors + 3 * norms + keys}
    assert "max_total_tokens" in unknown["engine kv_cache"]


def test_phases_hold_what_is_not_handed_over(tmp_path):
    make_tiny("qwen3", tmp_path)
    kept = predict(config(tmp_path), Cpu())
    assert len({phase.total for phase in kept.phases.values()}) == 1 and not kept.phases["rollout"].waiting
    handed = predict(config(tmp_path, learner={"release_memory": True}, rollout={"sleep": "all"}), Cpu())
    owners = {owner.name: owner.nbytes for owner in handed.owners}
    assert set(handed.phases["rollout"].held) == {"engine weights", "engine kv_cache"}
    assert set(handed.phases["publish"].held) == {"learner parameters", "engine weights"}
    assert set(handed.phases["train"].held) == {name for name in owners if name.startswith("learner")}
    assert handed.phases["rollout"].waiting == {name: owners[name] for name in (
        "learner parameters", "learner master_weights", "learner optimizer_state")}
    assert handed.of("train") == kept.of("train") - owners["engine weights"] - owners["engine kv_cache"]


def test_the_command_prints_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("launcher.overrides._model_problems", lambda *_: [])
    make_tiny("qwen3", tmp_path)
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps({"name": "n", "steps": 1, "model": {"path": str(tmp_path)}}))
    assert main(["memory", str(path), "--rollout.sleep", "all", "--device", "cuda", "--rollout.slots=8"]) == 0
    text = capsys.readouterr().out
    assert "engine kv_cache" in text and "on devices" in text and "not predicted: activations" in text
    assert main(["memory", str(path), "--json", "--device=cpu"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["phases"]["train"]["total_bytes"] == found["phases"]["train"]["device_bytes"] + found["shared_bytes"]


def account(train):
    return Account("cpu", (), {"publish": Phase({"a": GB}, {}), "train": Phase({"a": train}, {})}, 0, {}, {})


def test_a_large_deviation_is_said_once(capsys):
    used = [3 * GB]
    component = SimpleNamespace(memory=lambda: [MemoryUse({"weights": GB}, "here", used[0])])
    meter = MemoryMeter(account(2 * GB), [component])
    meter.leaving("publish")
    assert meter.metrics() == {}
    for used[0] in (4 * GB, 8 * GB, 8 * GB):
        meter.leaving("train")
    assert meter.metrics() == {"memory/train/predicted_gb": 2.0, "memory/train/used_gb": 6.0, "memory/base_gb": 2.0}
    assert meter.metrics() == {}
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "memory in the phase 'train': 6.00 GB are used beside the 2.00 GB of libraries, 2.00 GB were" in said


def test_a_place_that_several_name_counts_once():
    assert total([MemoryUse({}, "gpu 0", 5), MemoryUse({}, "gpu 0", 5), MemoryUse({}, "gpu 1", 7), MemoryUse({})]) == 12
    before = of_process({}).used
    block = torch.ones(1 << 25)
    assert of_process({}).used - before == pytest.approx(block.nbytes, rel=0.1)

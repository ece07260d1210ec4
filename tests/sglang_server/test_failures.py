"""What goes wrong with a server, and what the engine makes of it."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from contextlib import closing
from dataclasses import replace

import psutil
import pytest
from safetensors.torch import load_file
from sglang_server.servers import ARGS, section, start
from tiny_models import make_tiny

from megatron_pbsd.config import SGLangConfig
from megatron_pbsd.rollout.engines.protocol import Chunk, EngineDied, EngineError
from megatron_pbsd.rollout.engines.sglang import arguments

PROMPT = tuple(range(3, 20))


def below(engine) -> list[psutil.Process]:
    """All processes of the engine's server."""
    return psutil.Process(engine._server._processes.keeper.pid).children(recursive=True)


def assert_gone(processes) -> None:
    _, alive = psutil.wait_procs(processes, timeout=30)
    assert not alive


def test_a_port_that_is_taken_is_named(models, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(EngineError, match=rf"engine-0.*port {port} is taken by another process; \d+ is free.*"
                                              "rollout.sglang.port"):
            start(models["dense"], tmp_path, port=port)


def test_a_port_that_somebody_takes_meanwhile_is_left_for_another(models, tmp_path, monkeypatch):
    """Who took it listens and never answers, so the server says more after it was refused than is shown of its log."""
    with socket.socket() as taken, socket.socket() as free:
        for each in (taken, free):
            each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            each.bind(("127.0.0.1", 0))
        taken.listen()
        ports = [each.getsockname()[1] for each in (taken, free)]
        monkeypatch.setattr("megatron_pbsd.rollout.engines.sglang.server.free_port", iter(ports).__next__)
        with closing(start(models["dense"], tmp_path)) as engine:
            assert engine._server.client.port == ports[1]
        assert "address already in use" in (tmp_path / "engine-0.sglang.log").read_text()


def test_arguments_are_checked_against_the_installed_sglang():
    config = SGLangConfig(**section(args={"tp_sise": 2, "attention_backend": "torch_nativ", "dtype": 3}))
    problems = "\n".join(arguments.problems(config))
    assert "tp_sise is not an argument of the SGLang that is installed; did you mean 'tp_size'?" in problems
    assert "did you mean 'torch_native'?" in problems and "dtype = 3 is int, expected str" in problems
    assert len(problems.splitlines()) == 3 and not arguments.problems(SGLangConfig(**section()))


def test_a_server_that_dies_at_start_leaves_its_last_words(models, tmp_path):
    """It has no room for a page of KV."""
    with pytest.raises(EngineDied) as caught:
        start(models["dense"], tmp_path, args=ARGS | {"max_total_tokens": 1, "page_size": 64})
    assert "before it was ready" in str(caught.value) and str(tmp_path / "engine-0.sglang.log") in str(caught.value)
    assert any("Error" in line for line in caught.value.last_lines), caught.value.last_lines


def test_a_model_that_sglang_knows_less_of_is_refused(tmp_path):
    """Its Qwen3-MoE has experts in every layer, whatever `mlp_only_layers` says, and loads what it finds."""
    with pytest.raises(EngineError, match=r"SGLang's model is another than.*nothing belongs into its "
                                          r"'model.layers.2.mlp.*no place for tensor 'model.layers.2.mlp.gate_proj"):
        start(make_tiny("qwen3_moe", tmp_path / "model", mlp_only_layers=[2]), tmp_path)


@pytest.fixture(scope="module")
def unpublished(models, tmp_path_factory):
    """An engine without weights, for the tests below, the last of which it does not survive."""
    engine = start(models["dense"], tmp_path_factory.mktemp("logs"), load_weights=False)
    yield engine
    engine.close()


def test_nothing_is_generated_before_there_are_weights(unpublished):
    with pytest.raises(EngineError, match="engine-0.*no weights yet"):
        unpublished.submit([Chunk("r", PROMPT, 4, seed=0)])


def test_weights_that_are_cut_short_are_an_error_and_not_a_dead_server(unpublished, models, publish):
    tensors = load_file(models["dense"] / "model.safetensors")
    manifest, short = publish(tensors), publish({"tiny": tensors["model.norm.weight"]})
    for wrong, message in ((replace(manifest, segment="absent"), "'absent' does not exist"),
                           (replace(manifest, segment=short.segment), f"bytes, expected {manifest.nbytes}")):
        with pytest.raises(EngineError, match=f"engine-0.*version 1.*{message}"):
            unpublished.update_weights(wrong, 1)
    unpublished.update_weights(manifest, 1)
    unpublished.submit([Chunk("r", PROMPT, 4, seed=0, temperature=0.0)])
    (result,) = unpublished.collect()
    assert result.versions[0].version == 1


def test_a_collection_that_is_interrupted_returns_with_nothing(unpublished):
    unpublished.submit([Chunk("long", PROMPT, 100, seed=0)])
    threading.Timer(0.3, unpublished.interrupt).start()
    assert unpublished.collect() == unpublished.collect() == []
    unpublished.abort(["long"])
    (result,) = unpublished.collect()
    assert result.finish_reason == "abort" and len(result.tokens) < 100


def test_tokens_of_other_weights_are_never_served(unpublished):
    """A server that was put in the place of ours, by whomever, calls its weights something else; then it must go."""
    server = unpublished._server
    server.post("/update_weight_version", {"new_version": "1@another", "abort_all_requests": False})
    processes = below(unpublished)
    unpublished.submit([Chunk("stale", PROMPT, 4, seed=0)])
    with pytest.raises(EngineDied, match=r"'stale#\d+': it generated with weights \['1@another'\], but was given \['1"):
        unpublished.collect()
    assert_gone(processes)
    with pytest.raises(EngineDied):
        unpublished.statistics()


def test_a_server_that_is_killed_mid_publication(models, tmp_path, publish):
    """It holds the first half of new weights. It has to be started anew: it never serves again."""
    engine = start(models["dense"], tmp_path)
    processes, tensors = below(engine), load_file(models["dense"] / "model.safetensors")
    whole = publish(tensors)
    names = list(tensors)
    halves = [publish({name: tensors[name] for name in part}) for part in (names[:20], names[20:])]
    engine.begin_update(whole.described, 1)
    engine.load(halves[0])
    scheduler = next(p for p in processes if "scheduler" in " ".join(p.cmdline()))
    os.kill(scheduler.pid, signal.SIGKILL)
    with pytest.raises(EngineDied, match=r"its server (ended with status \d+|does not answer)[\s\S]*engine-0 \| "):
        engine.load(halves[1])
    assert_gone(processes)
    with pytest.raises(EngineError, match="in the middle of publication 1"):
        engine.submit([Chunk("r", PROMPT, 4, seed=0)])
    with pytest.raises(EngineDied):
        engine.begin_update(whole.described, 1)


def test_a_server_that_is_killed_mid_chunk(models, tmp_path):
    engine = start(models["dense"], tmp_path)
    processes = below(engine)
    folder = next(name for name in engine._server._processes.keeper.args if "pbsd-sglang-" in name)
    engine.submit([Chunk("r", PROMPT, 100, seed=0), Chunk("short", PROMPT, 3, seed=0)])
    assert engine.collect()[0].request_id == "short"
    scheduler = next(p for p in processes if "scheduler" in " ".join(p.cmdline()))
    os.kill(scheduler.pid, signal.SIGKILL)
    with pytest.raises(EngineDied, match=r"its server (ended with status \d+|does not answer)[\s\S]*engine-0 \| ") as e:
        engine.collect()
    assert e.value.last_lines
    assert_gone(processes)
    end = time.monotonic() + 10
    while os.path.exists(folder) and time.monotonic() < end:
        time.sleep(0.05)
    assert not os.path.exists(folder)

"""A server on two machines, for which two addresses of this one stand: each has processes of its own."""

from __future__ import annotations

import json
import os
import signal

import numpy as np
import psutil
import pytest
import torch
from engine_sleep import CONTEXT, asked, expected, finished
from safetensors.torch import load_file
from sglang_server.servers import DIVIDED, start_on_two
from sglang_server.test_transports import fewest

from megatron_pbsd.models import family
from megatron_pbsd.models.sglang import server_of
from megatron_pbsd.ports import free_port
from megatron_pbsd.resharding.broadcast import CollectiveTransport
from megatron_pbsd.resharding.checksum import checksum
from megatron_pbsd.resharding.disk import DiskTransport
from megatron_pbsd.resharding.shared_memory import attach
from megatron_pbsd.resharding.stream import plan_for
from megatron_pbsd.rollout.engines.protocol import MEMORY_TAGS, EngineDied
from tests.resharding.local_members import ONE, LocalMembers, OneRank

BUCKET = 1 << 15


def below(processes) -> list[psutil.Process]:
    keeper = psutil.Process(processes.keeper.pid)
    return [keeper, *keeper.children(recursive=True)]


@pytest.fixture(scope="module", params=[None, 8], ids=["plain", "drafting"])
def parts(request, models, tmp_path_factory):
    """The engine and its part on the second machine; the last test of each ends them."""
    logs = tmp_path_factory.mktemp("run") / "logs"
    engine, member = start_on_two(models["dense"], logs, longest_draft=request.param)
    yield engine, member
    engine.close()


def test_it_generates_what_transformers_does(parts, references):
    engine, _ = parts
    model = references["dense"]
    engine.submit([asked(CONTEXT[i:], 30) for i in range(3)])
    results = finished(engine)
    assert sorted(result.tokens for result in results) == sorted(expected(model, CONTEXT[i:], 30) for i in range(3))
    with torch.no_grad():
        log_probs = torch.log_softmax(model(torch.tensor([CONTEXT])).logits[0, :-1], dim=-1)
    chosen = log_probs.gather(1, torch.tensor(CONTEXT[1:])[:, None]).squeeze(1).numpy()
    np.testing.assert_allclose(engine.score([CONTEXT])[0][1:], chosen, atol=1e-5)
    assert engine.statistics().kv_tokens == 4096 and engine.memory().held["kv_cache"] > 0


@pytest.mark.parametrize("kind", [DiskTransport, CollectiveTransport])
def test_weights_arrive_and_are_read_back_bit_for_bit(parts, models, tmp_path, publish, kind):
    (engine, _), path = parts, models["dense"]
    hf = json.loads((path / "config.json").read_text())
    tensors, decoder = load_file(path / "model.safetensors"), family(hf).decoder(hf)
    generator = torch.Generator().manual_seed(5)
    changed = {name: t + 0.05 * torch.randn(t.shape, generator=generator) for name, t in tensors.items()}
    learner, target = LocalMembers(learner=OneRank(decoder, changed)), LocalMembers(**{"engine-0": engine})
    learner.tensors = learner.components["learner"].tensors
    options = {"folder": tmp_path, "deltas": 0} if kind is DiskTransport else {
        "decoder": decoder, "engine_ranks": 2, "meeting_point": lambda: ("127.0.0.1", free_port()), "deadline_s": 60.0}
    sending = kind(learner, target, plan_for(decoder, ONE, learner.tensors(), BUCKET), **options)
    try:
        version = engine.statistics().version
        for number, weights in enumerate((changed, tensors), start=1):
            learner.components["learner"].take(weights)
            engine.sleep(MEMORY_TAGS)
            engine.wake(MEMORY_TAGS)
            held = {name: checksum(tensor) for name, tensor in weights.items()}
            assert sending.send(version + number, ["engine-0"]) == held == engine.checksums()
            # Each machine's rank has taken its shares alone.
            assert engine._weights.taken == fewest(path, server_of(DIVIDED["tp2"]))
        copy = publish({name: torch.zeros_like(tensor) for name, tensor in tensors.items()})
        engine.write_weights(copy)
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in attach(copy).items())
    finally:
        sending.close()
        for each in (learner, target):
            each.close()
    assert not list(engine._server.shared.iterdir())


def test_processes_that_die_on_the_second_machine_end_it_on_both(parts):
    engine, member = parts
    processes = below(engine._server._processes) + below(member._processes)
    scheduler = next(p for p in below(member._processes) if "scheduler" in " ".join(p.cmdline()))
    engine.submit([asked(new=80)])
    os.kill(scheduler.pid, signal.SIGKILL)
    with pytest.raises(EngineDied, match=r"engine-0.node1: its processes ended with status \d+; their log is "
                                         r".*engine-0.node1.sglang.log[\s\S]*engine-0 \| node1 \| ") as death:
        finished(engine)
    assert any("node1 | " in line for line in death.value.last_lines)
    _, alive = psutil.wait_procs(processes, timeout=30)
    assert not alive
    with pytest.raises(EngineDied):
        engine.statistics()

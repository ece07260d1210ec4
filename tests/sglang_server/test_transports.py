"""Every transport into real servers, in the middle of requests too; the same into the embedded engine."""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager
from dataclasses import replace
from itertools import count

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sglang_server.servers import DIVIDED
from transformers import AutoModelForCausalLM

from megatron_pbsd.boxes import size
from megatron_pbsd.config import ParallelConfig
from megatron_pbsd.models import family
from megatron_pbsd.models.sglang import server_of
from megatron_pbsd.ports import free_port
from megatron_pbsd.resharding.broadcast import CollectiveTransport
from megatron_pbsd.resharding.checksum import checksum
from megatron_pbsd.resharding.disk import DiskTransport
from megatron_pbsd.resharding.ipc import IPCTransport
from megatron_pbsd.resharding.layouts import learner_layout, server_layout
from megatron_pbsd.resharding.minimum import minimum, server_maps
from megatron_pbsd.resharding.plan import Link, make_plan
from megatron_pbsd.resharding.stream import plan_for
from megatron_pbsd.resharding.transport import BucketsTransport, SegmentTransport
from megatron_pbsd.rollout.engines.protocol import Chunk, EngineError
from megatron_pbsd.rollout.engines.sglang import weights
from megatron_pbsd.rollout.engines.sglang.engine import SGLangEngine
from tests.resharding.local_members import ONE, LocalMembers, OneRank

VERSIONS = count(1000)
BUCKET = 1 << 15
PROMPT = tuple(range(3, 20))


@pytest.fixture(params=[(kind, model) for model in ("dense", "moe") for kind in ("embedded", "sglang")],
                ids=lambda param: "-".join(param))
def world(request, engines, models):
    kind, model = request.param
    with world_of(engines(kind, model), models[model], 2 if kind in DIVIDED else 1) as world:
        yield world


@contextmanager
def world_of(engine, path, size):
    """Learner, engine of `size` ranks, weights, and what makes transports between them; in the end the engine has its
    first weights again."""
    hf = json.loads((path / "config.json").read_text())
    tensors = load_file(path / "model.safetensors")
    decoder = family(hf).decoder(hf)
    learner, target = LocalMembers(learner=OneRank(decoder, tensors)), LocalMembers(**{"engine-0": engine})
    learner.tensors = learner.components["learner"].tensors
    made = []

    def transport(transport_kind, folder, bucket=BUCKET, **options):
        plan = plan_for(decoder, ONE, learner.tensors(), None if transport_kind is SegmentTransport else bucket)
        if transport_kind is DiskTransport:
            options = {"folder": folder, "deltas": 2} | options
        if transport_kind is IPCTransport:
            options = {"engine_ranks": size}
        if transport_kind is CollectiveTransport:
            options = {"decoder": decoder, "engine_ranks": size,
                       "meeting_point": lambda: ("127.0.0.1", free_port()), "deadline_s": 60.0} | options
        made.append(transport_kind(learner, target, plan, **options))
        return made[-1]

    yield learner.components["learner"], engine, tensors, transport
    learner.components["learner"].take(tensors)
    transport(SegmentTransport, None).send(next(VERSIONS), ["engine-0"])
    for each in made:
        each.close()
    for members in (learner, target):
        members.close()


def other(tensors, seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: t + 0.05 * torch.randn(t.shape, generator=generator) for name, t in tensors.items()}


@pytest.mark.parametrize("kind", [SegmentTransport, BucketsTransport, IPCTransport, CollectiveTransport, DiskTransport])
def test_what_arrives_is_what_was_sent(world, tmp_path, kind):
    learner, engine, tensors, transport = world
    if kind is CollectiveTransport and not isinstance(engine, SGLangEngine):
        pytest.skip("one process cannot be two members of a group; tests/resharding/test_transports.py has several")
    sending = transport(kind, tmp_path)
    for seed in (1, 2):
        changed = other(tensors, seed)
        learner.take(changed)
        engine.submit([short := Chunk(f"short-{next(VERSIONS)}", PROMPT, 3, 0, 0.0),
                       Chunk(f"long-{next(VERSIONS)}", PROMPT, 90, 0, 0.0)])
        before, ended = engine.statistics().version, []
        while short.request_id not in [result.request_id for result in ended]:
            ended += engine.collect()
        version = next(VERSIONS)
        expected = {name: checksum(tensor) for name, tensor in changed.items()}
        assert sending.send(version, ["engine-0"]) == expected == engine.checksums()
        assert engine.statistics().version == version
        while results := engine.collect():
            ended += results
        (long,) = [result for result in ended if result.request_id.startswith("long")]
        versions = [span.version for span in long.versions]
        # While files are written the engine goes on with what it has.
        assert versions == [before, version] or (versions == [before] and kind is DiskTransport)
        assert len(long.tokens) == 90


def fewest(path, server):
    """Bytes that each rank of a server needs, and the ranks of a learner of another layout have not, by the plan that
    `pbsd reshard-plan` prints; of all ranks together also by their parameter maps alone."""
    hf = json.loads((path / "config.json").read_text())
    decoder, learner = family(hf).decoder(hf), ParallelConfig(world_size=4, tp=2, ep=2 if "num_experts" in hf else 1)
    plan = make_plan(learner_layout(decoder, learner), server_layout(decoder, server, 1, device=4),
                     source_dtype="float32", target_dtype="float32", devices_per_node=8, bucket_bytes=BUCKET)
    assert plan.moved == minimum([], server_maps(decoder, server, 1), lambda _, box: 4 * size(box))
    return plan.received(Link.NODE).tolist()


def log_probs(path, tensors, folder):
    """Of PROMPT under transformers' model with these tensors."""
    save_file(dict(tensors), folder / "model.safetensors", {"format": "pt"})
    shutil.copy(path / "config.json", folder)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        found = model(torch.tensor([PROMPT])).logits[0].log_softmax(-1)
    return found[range(len(PROMPT) - 1), PROMPT[1:]].numpy()


@pytest.mark.parametrize("world", [
    ("sglang", "dense"), ("tp2", "dense"), ("sglang", "moe"), ("tp2", "moe"), ("ep2", "moe")],
    indirect=True, ids="-".join)
@pytest.mark.parametrize("kind", [SegmentTransport, BucketsTransport, CollectiveTransport, DiskTransport])
def test_each_rank_takes_what_it_lacks_and_no_more(world, models, request, tmp_path, kind):
    learner, engine, tensors, transport = world
    server, model = request.node.callspec.params["world"]
    engine_ranks = fewest(models[model], server_of(DIVIDED.get(server, {})))
    sending, version = transport(kind, tmp_path), next(VERSIONS)
    learner.take(changed := other(tensors, version))
    assert sending.send(version, ["engine-0"]) == engine.checksums()
    assert engine._weights.taken == engine_ranks
    assert engine.checksums() == {name: checksum(tensor) for name, tensor in changed.items()}
    (scores,) = engine.score([PROMPT])
    np.testing.assert_allclose(scores[1:], log_probs(models[model], changed, tmp_path), atol=1e-5)


@pytest.mark.parametrize("world", [("sglang", "dense"), ("tp2", "moe")], indirect=True, ids="-".join)
@pytest.mark.parametrize("kind", [SegmentTransport, CollectiveTransport, DiskTransport])
def test_a_model_that_is_divided_otherwise_is_given_whole_tensors(world, models, request, tmp_path, capsys, kind):
    """The plan is of a model whose tensors are not these."""
    learner, engine, tensors, transport = world
    server, model = request.node.callspec.params["world"]
    hf = json.loads((models[model] / "config.json").read_text())
    decoder = family(hf).decoder(hf)
    planned = [engine._server, decoder, server_of(DIVIDED.get(server, {})),
               {name: tuple(tensor.shape) for name, tensor in tensors.items()}]
    other_heads = replace(decoder, num_key_value_heads=4, num_hidden_layers=3)
    engine._weights = weights.ServerWeights(planned[0], other_heads, *planned[2:])
    try:
        assert "engine-0 is given whole tensors, as its model is not divided as planned: " in (
            said := capsys.readouterr().err)
        assert "'model.layers.0.self_attn.qkv_proj.weight' has shape" in said and "more" in said
        learner.take(changed := other(tensors, version := next(VERSIONS)))
        transport(kind, tmp_path).send(version, ["engine-0"])
        assert engine.checksums() == {name: checksum(tensor) for name, tensor in changed.items()}
        assert not any(engine._weights.taken)
    finally:
        engine._weights = weights.ServerWeights(*planned)
    assert engine._weights.divided


@pytest.mark.parametrize("world", [("sglang", "dense"), ("tp2", "dense"), ("tp2", "moe"), ("ep2", "moe")],
                         indirect=True, ids="-".join)
def test_checksums_are_put_together_without_the_weights(world, monkeypatch):
    """What the ranks have tiles every tensor: none has to be read."""
    _, engine, tensors, _ = world
    monkeypatch.setattr(engine._weights, "_read", None)
    assert engine.checksums() == {name: checksum(tensor) for name, tensor in tensors.items()}


def test_changes_alone_are_written_where_the_engine_has_the_rest(world, tmp_path, capsys):
    learner, engine, tensors, transport = world
    sending = transport(DiskTransport, tmp_path)
    versions = [next(VERSIONS) for _ in range(4)]
    sending.send(versions[0], ["engine-0"])
    changed = dict(tensors)
    for version, name in zip(versions[1:3], ("model.norm.weight", "model.layers.1.mlp.gate.weight"
                             if "model.layers.1.mlp.gate.weight" in tensors else "model.embed_tokens.weight")):
        changed = changed | {name: changed[name] * 1.5}
        learner.take(changed)
        sending.send(version, ["engine-0"])
        (file,) = (tmp_path / f"version_{version}").glob("*.safetensors")
        assert load_file(file).keys() == {name}
        assert engine.checksums() == {n: checksum(tensor) for n, tensor in changed.items()}
    sending.restore(versions[2], "engine-0")
    assert engine.checksums() == {n: checksum(tensor) for n, tensor in changed.items()}
    assert len(list(tmp_path.iterdir())) == 3
    sending.send(versions[3], ["engine-0"])
    assert [path.name for path in tmp_path.iterdir()] == [f"version_{versions[3]}"] and not capsys.readouterr().err


def test_an_engine_with_something_else_is_given_everything(world, tmp_path, publish, capsys):
    _, engine, tensors, transport = world
    sending = transport(DiskTransport, tmp_path)
    sending.send(next(VERSIONS), ["engine-0"])
    engine.update_weights(
        publish(tensors | {"model.norm.weight": tensors["model.norm.weight"] + 1}), next(VERSIONS))
    assert sending.send(next(VERSIONS), ["engine-0"]) == engine.checksums()
    assert "is written whole: engine-0 has not version" in (said := capsys.readouterr().err)
    assert "['model.norm.weight']" in said


def test_between_two_versions_nothing_is_served(world, tmp_path):
    learner, engine, tensors, transport = world
    sending, version = transport(BucketsTransport, None), next(VERSIONS)
    learner.take(other(tensors, 3))
    learner.gather(0)
    engine.begin_update(learner.tensors(), version)
    engine.load(sending._buckets.buckets[0].manifest)
    for attempt in (lambda: engine.submit([Chunk("r", PROMPT, 4, 0)]), lambda: engine.score([[1, 2]]), engine.collect):
        with pytest.raises(EngineError, match=f"engine-0.* in the middle of publication {version}"):
            attempt()
    with pytest.raises(EngineError, match="version .* is incomplete: nothing arrived for .*norm.weight"):
        engine.end_update()
    with pytest.raises(EngineError, match="cannot be used: the engine is between two versions"):
        engine.begin_update(learner.tensors(), version + 1, version)
    version = next(VERSIONS)
    assert sending.send(version, ["engine-0"]) == engine.checksums()
    engine.submit([Chunk("r", PROMPT, 4, 0)])
    (result,) = engine.collect()
    assert result.versions[0].version == version

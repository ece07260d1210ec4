"""Publication into a real engine; the source is transformers, so that nothing of ours vouches for itself."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from megatron_pbsd.errors import PbsdError
from megatron_pbsd.models import family
from megatron_pbsd.resharding import shared_folder, shared_memory
from megatron_pbsd.resharding.checksum import checksum
from megatron_pbsd.resharding.disk import DiskTransport
from megatron_pbsd.resharding.manifest import layout
from megatron_pbsd.resharding.publication import PublicationError, Publisher
from megatron_pbsd.resharding.shared_memory import Segment, attach
from megatron_pbsd.resharding.stream import plan_for
from megatron_pbsd.resharding.transport import BucketsTransport, SegmentTransport
from megatron_pbsd.rollout.engines.embedded.engine import EmbeddedEngine
from megatron_pbsd.rollout.engines.protocol import Chunk, EngineError
from tests.resharding.local_members import ONE, LocalMembers, OneRank

PROBE = [[5, 9, 2, 33, 7], [1, 2, 3, 4, 5, 6, 7, 8]]
KINDS = {"segment": SegmentTransport, "buckets": BucketsTransport, "disk": DiskTransport}
BUCKET = 8192
VICTIM = "model.layers.1.mlp.up_proj.weight"


class TransformersSource(OneRank):
    """A learner whose weights and log-probs are a transformers model's."""

    def __init__(self, model, decoder):
        self.model, self.replicas_differ = model, []
        super().__init__(decoder, self.weights())

    def weights(self):
        return {name: p for name, p in self.model.state_dict().items() if name != "lm_head.weight"}

    def gather(self, number):
        self.take(self.weights())
        super().gather(number)

    def store(self, number, path, held):
        self.take(self.weights())
        return super().store(number, path, held)

    def differing(self, manifest):
        return self.replicas_differ or super().differing(manifest)

    def log_probs(self, batch):
        scores = []
        for tokens in batch["tokens"]:
            with torch.no_grad():
                logits = self.model(torch.from_numpy(tokens)[None]).logits[0, :-1].log_softmax(-1)
            chosen = logits.gather(1, torch.from_numpy(tokens[1:])[:, None])[:, 0]
            scores.append(np.concatenate([[0.0], chosen.numpy()]).astype(np.float32))
        return scores


class LocalLearner(LocalMembers):
    def __init__(self, rank):
        super().__init__(learner=rank)
        self.tensors, self.log_probs = rank.tensors, rank.log_probs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    Qwen3ForCausalLM(Qwen3Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, tie_word_embeddings=True)).save_pretrained(folder)
    return folder


@pytest.fixture
def source(folder):
    model = Qwen3ForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.25)
    hf = json.loads((folder / "config.json").read_text())
    return TransformersSource(model, family(hf).decoder(hf))


@pytest.fixture
def engines(folder):
    return [EmbeddedEngine(str(folder), name=f"engine-{i}", slots=2, max_context=32) for i in range(2)]


each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def kind():
    return "segment"


@pytest.fixture
def publisher(kind, source, folder, tmp_path):
    """With a transport that one process can be both sides of."""
    hf, made = json.loads((folder / "config.json").read_text()), []

    def start(*engines, tolerance=1e-4):
        target, learner = LocalMembers(**{engine.name: engine for engine in engines}), LocalLearner(source)
        plan = plan_for(family(hf).decoder(hf), ONE, source.tensors(), None if kind == "segment" else BUCKET)
        transport = KINDS[kind](learner, target, plan, *(
            [tmp_path / "weights", 3] if kind == "disk" else []))
        made.append(Publisher(transport, learner, target, PROBE, tolerance))
        return made[-1]

    yield start
    for publisher in made:
        publisher.close()


@pytest.fixture
def publish(publisher):
    return lambda *engines: publisher(*engines).publish


class Flips(EmbeddedEngine):
    """After an update one bit is another."""

    def checksums(self):
        self._parameters[VICTIM].view(torch.int32)[0, 0] ^= 1
        return super().checksums()


@each_kind
def test_every_engine_computes_with_the_new_weights(publish, source, engines):
    metrics = publish(*engines)(3)
    assert metrics["weights/probe_max_abs"] < 1e-5
    for engine in engines:
        assert engine.statistics().version == 3
        assert engine.checksums() == {name: checksum(p) for name, p in source.weights().items()}


@each_kind
def test_one_wrong_bit_in_one_engine_is_named(publish, folder, engines):
    flips = Flips(str(folder), name="engine-1", slots=2, max_context=32)
    with pytest.raises(PublicationError, match=rf"version 1: engine-1 .*\['{VICTIM}'\]"):
        publish(engines[0], flips)(1)


def test_ranks_that_disagree_are_named_by_tensor(publish, source, engines):
    source.replicas_differ = [VICTIM]
    with pytest.raises(PublicationError, match=VICTIM):
        publish(*engines)(1)


def test_right_bytes_in_a_wrong_model_are_found_by_the_probe(publish, source, engines):
    """The engine's rotary base differs: every tensor arrives, and every answer is wrong."""
    source.model.model.rotary_emb.inv_freq.mul_(0.5)
    with pytest.raises(PublicationError, match=r"log-probs of engine-0 differ .* bit-identical"):
        publish(*engines)(1)


def test_nan_in_the_log_probs_is_a_mismatch(publish, source, engines):
    with torch.no_grad():
        source.model.model.norm.weight[0] = torch.nan
    with pytest.raises(PublicationError, match="differ"):
        publish(*engines)(1)


class Dies(PbsdError):
    """What a component does in the middle of a publication."""


@each_kind
def test_the_engines_give_back_what_the_learner_has_begun_to_overwrite(publisher, source, engines):
    def gather_half(number):
        OneRank.gather(source, number)
        for target in list(attach(source._parts.buckets[number].manifest).values())[::2]:
            target.fill_(7.0)
        raise Dies

    def store_half(number, path, held):
        Path(path).write_bytes(b"half of it")
        raise Dies

    publishing = publisher(*engines)
    assert publishing.published is None
    publishing.publish(4)
    assert publishing.published.version == 4
    expected = {name: checksum(p) for name, p in source.weights().items()}
    assert publishing.published.checksums == expected
    source.gather, source.store = gather_half, store_half
    with pytest.raises(Dies):
        publishing.publish(5)
    engines[0]._parameters.pop(VICTIM)
    right = {where: {name: checksum(t) for name, t in tensors.items()} == expected
             for where, tensors in publishing.copies()}
    first = {"SegmentTransport": {"the segment": False}, "BucketsTransport": {}}.get(
        type(publishing._transport).__name__, {next(iter(right)): True})
    assert right == first | {"engine-1": True}


class DiesOnce(EmbeddedEngine):
    """When a part of the new weights is there."""

    dies = True

    def load(self, bucket):
        super().load(bucket)
        if self.dies:
            self.dies = False
            raise Dies


@each_kind
def test_engines_that_outlive_one_in_the_middle_serve_nothing_until_the_next_publication(publisher, source, folder):
    mortal = DiesOnce(str(folder), name="engine-0", slots=2, max_context=32)
    well = EmbeddedEngine(str(folder), name="engine-1", slots=2, max_context=32)
    publishing = publisher(mortal, well)
    with pytest.raises(Dies):
        publishing.publish(1)
    if not isinstance(publishing._transport, SegmentTransport):
        with pytest.raises(EngineError, match="engine-1.* in the middle of publication 1"):
            well.submit([Chunk("r", (1, 2), 3, 0)])
    publishing.publish(1)
    for engine in (mortal, well):
        assert engine.checksums() == publishing.published.checksums and engine.statistics().version == 1
        engine.submit([Chunk("r", (1, 2), 3, 0)])
        assert engine.collect()[0].versions[0].version == 1


@each_kind
def test_an_engine_started_anew_is_given_what_the_others_have(publisher, source, engines, folder):
    publishing = publisher(*engines)
    publishing.publish(6)
    with torch.no_grad():
        source.weights()[VICTIM].mul_(2)
    publishing.publish(7)
    anew = EmbeddedEngine(str(folder), name="engine-1", slots=2, max_context=32)
    publishing._target.components["engine-1"] = anew
    publishing.restore("engine-1")
    assert anew.checksums() == engines[0].checksums() and anew.statistics().version == 7


def test_segments_of_dead_owners_are_removed(monkeypatch, tmp_path):
    for module in (shared_memory, shared_folder):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    (tmp_path / "pbsd-999999999-x").touch()
    segment = Segment(64)
    assert [path.name for path in tmp_path.iterdir()] == [segment.name]
    segment.close()
    assert not list(tmp_path.iterdir())


def test_a_segment_that_is_gone_or_too_short_is_named():
    described = {"w": ("float32", (4,))}
    segment = Segment(8)
    manifest = layout(segment.name, described)
    with pytest.raises(ValueError, match=f"{segment.name}.* has 8 bytes, expected 64"):
        attach(manifest)
    segment.close()
    with pytest.raises(ValueError, match="does not exist"):
        attach(dataclasses.replace(manifest))

"""Publication into a real engine; the source is transformers, so that nothing of ours vouches for itself."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from megatron_pbsd.errors import PbsdError
from megatron_pbsd.resharding import shared_memory
from megatron_pbsd.resharding.manifest import checksum, layout
from megatron_pbsd.resharding.publication import PublicationError, Publisher
from megatron_pbsd.resharding.shared_memory import Segment, attach
from megatron_pbsd.rollout.engines.embedded.engine import EmbeddedEngine

PROBE = [[5, 9, 2, 33, 7], [1, 2, 3, 4, 5, 6, 7, 8]]
VICTIM = "model.layers.1.mlp.up_proj.weight"


class TransformersSource:
    """A learner whose weights and log-probs are a transformers model's."""

    def __init__(self, model):
        self.model = model
        self.replicas_differ: list[str] = []

    def weights(self):
        return {name: p for name, p in self.model.state_dict().items() if name != "lm_head.weight"}

    def tensors(self):
        return {name: ("float32", tuple(p.shape)) for name, p in self.weights().items()}

    def publish(self, manifest):
        for name, target in attach(manifest).items():
            target.copy_(self.weights()[name])

    def differing(self, manifest):
        return self.replicas_differ

    def log_probs(self, batch):
        scores = []
        for tokens in batch["tokens"]:
            with torch.no_grad():
                logits = self.model(torch.from_numpy(tokens)[None]).logits[0, :-1].log_softmax(-1)
            chosen = logits.gather(1, torch.from_numpy(tokens[1:])[:, None])[:, 0]
            scores.append(np.concatenate([[0.0], chosen.numpy()]).astype(np.float32))
        return scores


class Engines:
    """Engines of this process as the publisher sees them. `after_update` is called with each one."""

    def __init__(self, *engines, after_update=lambda engine: None):
        self.names = [engine.name for engine in engines]
        self._engines, self._after_update = engines, after_update

    def update_weights(self, manifest, version):
        for engine in self._engines:
            engine.update_weights(manifest, version)
            self._after_update(engine)

    def write_weights(self, manifest, engine):
        self._engines[engine].write_weights(manifest)

    def checksums(self):
        return [engine.checksums() for engine in self._engines]

    def score(self, sequences):
        return [engine.score(sequences) for engine in self._engines]


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
    return TransformersSource(model)


@pytest.fixture
def engines(folder):
    return [EmbeddedEngine(str(folder), name=f"engine-{i}", slots=2, max_context=32) for i in range(2)]


@pytest.fixture
def publisher(source):
    made = []

    def start(target, tolerance=1e-4):
        made.append(Publisher(source, target, PROBE, tolerance))
        return made[-1]

    yield start
    for publisher in made:
        publisher.close()


@pytest.fixture
def publish(publisher):
    return lambda *arguments: publisher(*arguments).publish


def test_every_engine_computes_with_the_new_weights(publish, source, engines):
    metrics = publish(Engines(*engines))(3)
    assert metrics["weights/probe_max_abs"] < 1e-5
    for engine in engines:
        assert engine.statistics().version == 3
        assert engine.checksums() == {name: checksum(p) for name, p in source.weights().items()}


def test_one_wrong_bit_in_one_engine_is_named(publish, engines):
    def flip(engine):
        if engine.name == "engine-1":
            engine._parameters[VICTIM].view(torch.int32)[0, 0] ^= 1

    with pytest.raises(PublicationError, match=rf"version 1: engine-1 .*\['{VICTIM}'\]"):
        publish(Engines(*engines, after_update=flip))(1)


def test_ranks_that_disagree_are_named_by_tensor(publish, source, engines):
    source.replicas_differ = [VICTIM]
    with pytest.raises(PublicationError, match=VICTIM):
        publish(Engines(*engines))(1)


def test_right_bytes_in_a_wrong_model_are_found_by_the_probe(publish, source, engines):
    """The engine's rotary base differs: every tensor arrives, and every answer is wrong."""
    source.model.model.rotary_emb.inv_freq.mul_(0.5)
    with pytest.raises(PublicationError, match=r"log-probs of engine-0 differ .* bit-identical"):
        publish(Engines(*engines))(1)


def test_nan_in_the_log_probs_is_a_mismatch(publish, source, engines):
    with torch.no_grad():
        source.model.model.norm.weight[0] = torch.nan
    with pytest.raises(PublicationError, match="differ"):
        publish(Engines(*engines))(1)


def test_the_engines_give_back_what_the_learner_has_begun_to_overwrite(publisher, source, engines):
    class Dies(PbsdError):
        """What a learner does in the middle of a publication."""

    def publish_half(manifest):
        for target in list(attach(manifest).values())[::2]:
            target.fill_(7.0)
        raise Dies

    publishing = publisher(Engines(*engines))
    assert publishing.published is None
    publishing.publish(4)
    assert publishing.published.version == 4
    expected = {name: checksum(p) for name, p in source.weights().items()}
    assert publishing.published.checksums == expected
    source.publish = publish_half
    with pytest.raises(Dies):
        publishing.publish(5)
    engines[0]._parameters.pop(VICTIM)
    right = {where: {name: checksum(t) for name, t in tensors.items()} == expected
             for where, tensors in publishing.copies()}
    assert right == {"the segment": False, "engine-1": True}


def test_segments_of_dead_owners_are_removed(monkeypatch, tmp_path):
    monkeypatch.setattr(shared_memory, "ROOT", tmp_path)
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

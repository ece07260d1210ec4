"""Every transport between real learner ranks, which share each tensor, and engines, in processes of their own."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import make_tiny

from megatron_pbsd.components import build_engine, build_transport, start_learner
from megatron_pbsd.config import RunConfig
from megatron_pbsd.controller.failures import ComponentDied
from megatron_pbsd.resharding.checksum import checksum
from megatron_pbsd.resharding.publication import Publisher
from megatron_pbsd.rollout.engine_group import EngineGroup

pytestmark = pytest.mark.slow
PROBE = np.random.default_rng(0).integers(64, size=(3, 20)).tolist()
BUCKET_MB = 1
KINDS = {"segment": {}, "buckets": {"bucket_mb": BUCKET_MB}, "ipc": {"bucket_mb": BUCKET_MB},
         "collective": {"bucket_mb": BUCKET_MB}, "disk": {"bucket_mb": BUCKET_MB, "deltas": 2}}
FATAL = 666
"""A version that engine-1 does not survive, once."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A mixture of experts with a dense layer and one of each, in two buckets; and the same with other weights."""
    first = make_tiny("qwen3_moe", tmp_path_factory.mktemp("model"), vocab_size=4096)
    second = tmp_path_factory.mktemp("other")
    generator = torch.Generator().manual_seed(1)
    save_file({name: t + 0.1 * torch.randn(t.shape, generator=generator) for name, t in tensors_of(first).items()},
              second / "model.safetensors", {"format": "pt"})
    (second / "config.json").write_text((first / "config.json").read_text())
    return first, second


def tensors_of(folder):
    return load_file(folder / "model.safetensors")


def config_of(folder, path, **transport):
    return RunConfig.model_validate({
        "name": "run", "runs": str(path), "steps": 10, "model": {"path": str(folder)}, "algorithm": {"name": "sft"},
        "learner": {"parallel": {"world_size": 2, "tp": 2, "ep": 2}, "precision": "float32"},
        "rollout": {"engines": 2, "slots": 2, "max_context": 64, "max_turn_tokens": 16, "transport": transport}})


class Mortal:
    """The engine, but for its death."""

    def __init__(self, name, sign, **arguments):
        self._engine, self._sign, self._mortal = build_engine(name=name, **arguments), sign, name == "engine-1"
        self._version = 0

    def begin_update(self, tensors, version, base=None):
        self._version = version
        self._engine.begin_update(tensors, version, base)

    def load(self, bucket):
        self._engine.load(bucket)
        if self._mortal and self._version == FATAL and not self._sign.exists():
            self._sign.touch()
            os._exit(3)

    def __getattr__(self, name):
        return getattr(self._engine, name)


@pytest.fixture(scope="module")
def components(ray_runtime, folders, tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    learner = start_learner(ray_runtime, config_of(folders[0], path))
    engines = EngineGroup.spawn(ray_runtime, Mortal, count=2, deadline_s=120.0, sign=path / "died",
                                model_path=str(folders[0]), slots=2, max_context=64)
    learner.ready()
    engines.ready()
    return learner, engines


@pytest.fixture
def publisher(components, folders, tmp_path):
    made = []

    def start(kind):
        learner, engines = components
        config = config_of(folders[0], tmp_path, kind=kind, **KINDS[kind])
        made.append(Publisher(build_transport(config, learner, engines), learner, engines, PROBE, 1e-4))
        return made[-1]

    yield start
    for each in made:
        each.close()


@pytest.mark.parametrize("kind", KINDS)
def test_engines_have_what_the_learner_has(publisher, components, folders, kind):
    learner, engines = components
    publishing = publisher(kind)
    for version, folder in enumerate(reversed(folders), start=1):
        learner.replace_weights(str(folder), 0)
        metrics = publishing.publish(version)
        assert metrics["weights/probe_max_abs"] < 1e-5
        assert [s.version for s in engines.statistics()] == [version] * 2
        expected = {name: checksum(tensor) for name, tensor in tensors_of(folder).items()}
        assert engines.checksums() == [expected] * 2 and publishing.published.checksums == expected


def test_a_group_that_has_lost_an_engine_is_made_anew(publisher, components, folders):
    """It dies when it has the first of two buckets; the other is in the middle, and so is the learner."""
    learner, engines = components
    publishing = publisher("collective")
    publishing.publish(1)
    learner.replace_weights(str(folders[1]), 0)
    with pytest.raises(ComponentDied, match="engine-1 died"):
        publishing.publish(FATAL)
    engines.restart("engine-1")
    publishing.publish(FATAL)
    expected = {name: checksum(tensor) for name, tensor in tensors_of(folders[1]).items()}
    assert engines.checksums() == [expected] * 2
    # Engines that generate take no part in what one is given that has been started anew.
    learner.replace_weights(str(folders[0]), 0)
    publishing._transport.restore(3, "engine-1")
    assert [s.version for s in engines.statistics()] == [FATAL, 3]

"""Weights that were recovered: all of them or none, refused when damaged, gone on from only when they are newer."""

from __future__ import annotations

import json
import re
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_disk import small_disk
from synthetic_run import run_config

from megatron_pbsd.checkpointing import recovery
from megatron_pbsd.checkpointing.errors import CheckpointError
from megatron_pbsd.checkpointing.manifest import Contents, read_manifest
from megatron_pbsd.checkpointing.store import CheckpointStore
from megatron_pbsd.environments.protocol import Task
from megatron_pbsd.errors import UsageError
from megatron_pbsd.prompts import Stream, position
from megatron_pbsd.resharding.checksum import checksum
from megatron_pbsd.resharding.manifest import layout
from megatron_pbsd.resharding.publication import Published
from megatron_pbsd.resharding.shared_memory import Segment, attach
from megatron_pbsd.resume import Start, find_start, leaving_weights
from megatron_pbsd.rollout.request import RolloutRequest, Started, Unfinished
from megatron_pbsd.trajectory import Trajectory, Turn, VersionSpan

TENSORS = {"model.norm.weight": torch.randn(64), "lm_head.weight": torch.randn(50, 64).bfloat16()}


@pytest.fixture
def config(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text('{"model_type": "qwen3"}')
    return run_config(runs=str(tmp_path), model={"path": str(tmp_path / "base")})


@contextmanager
def opened(config):
    with CheckpointStore(config.folder / "checkpoints", config.checkpoint, 30.0) as store:
        yield store


def save(store, config, step):
    with store.writing(Contents(step, {}, {}, position(config, 10 * step)), 0) as folder:
        (folder / "state").write_text(str(step))
    store.finish()


@contextmanager
def publisher(version, spoilt=()):
    """Of weights that lie in a segment, which are what was published but for those that are `spoilt`."""
    shapes = {name: (str(tensor.dtype)[6:], tuple(tensor.shape)) for name, tensor in TENSORS.items()}
    segment = Segment(layout("", shapes).nbytes)
    held = attach(layout(segment.name, shapes))
    for name, tensor in TENSORS.items():
        held[name].copy_(tensor)
    checksums = {name: checksum(tensor) for name, tensor in held.items()}
    for name in spoilt:
        held[name][0] += 1
    yield SimpleNamespace(published=Published(version, checksums), copies=lambda: iter([("the segment", held)]))
    segment.close()


def fail(config, **published):
    """A run that dies after `published`."""
    with publisher(**published) as source, pytest.raises(ZeroDivisionError), \
            leaving_weights(source, config.folder / "checkpoints", config, lambda: Stream(10 * published["version"])):
        raise ZeroDivisionError


def test_weights_newer_than_the_checkpoint_are_kept_and_gone_on_from(config, capsys):
    with opened(config) as store:
        save(store, config, 3)
        fail(config, version=5)
    kept = store.folder / "recovered"
    assert re.search(r"weights of step 5, .* were recovered from the engines \(the segment\) into .*recovered: "
                     r"--resume goes on from them, with the optimizer state of step_3", capsys.readouterr().err)
    found = load_file(kept / "model.safetensors")
    assert found.keys() == TENSORS.keys() and all(
        found[n].dtype == t.dtype and torch.equal(found[n], t) for n, t in TENSORS.items())
    assert json.loads((kept / "config.json").read_text()) == {"model_type": "qwen3"}
    assert recovery.problems(kept) == []
    with opened(config) as store:
        start = find_start(store, config, "latest")
        assert start == Start(5, store.folder / "step_3", 3, kept, Stream(50))
        assert "recovered weights of step 5 from the engines; optimizer state of step 3" in capsys.readouterr().err
        assert start.metrics(6) == {"recovered/weights_step": 5.0, "recovered/optimizer_step": 3.0}
        assert start.metrics(7) == Start(5, start.checkpoint, 5).metrics(6) == {}
        save(store, config, 4)
        assert kept.exists(), "a checkpoint of an older step replaces nothing"
        save(store, config, 5)
        assert not kept.exists()
        assert find_start(store, config, "latest") == Start(5, store.folder / "step_5", 5, stream=Stream(50))


def test_nothing_is_recovered_that_a_checkpoint_has(config, capsys):
    with opened(config) as store:
        for step in (3, 5):
            save(store, config, step)
        fail(config, version=5)
        with leaving_weights(None, store.folder, config, Stream):
            pass
        assert not (store.folder / "recovered").exists() and capsys.readouterr().err == ""


def test_without_any_checkpoint_the_optimizer_begins_anew(config, capsys):
    with opened(config) as store:
        fail(config, version=0)
        assert not (store.folder / "recovered").exists()
        fail(config, version=2)
        assert "with a new optimizer: no checkpoint had been made" in capsys.readouterr().err
        assert find_start(store, config, "latest") == Start(2, None, 0, store.folder / "recovered", Stream(20))


def test_weights_that_were_being_overwritten_are_not_kept(config, capsys):
    with opened(config) as store:
        fail(config, version=5, spoilt=["lm_head.weight"])
        assert ("step 5 could not be recovered from the engines: the segment: not what was published: lm_head.weight"
                in capsys.readouterr().err)
        assert not list(store.folder.glob("recovered*"))


@pytest.mark.parametrize(("size", "words"), [
    ("4k", r"they need 6656 bytes, 4096 are free"), ("8k", r"recovered was not written: .*No space left")])
def test_a_full_disk_is_said_beside_the_failure(config, size, words, capsys):
    folder = config.folder / "checkpoints"
    folder.mkdir(parents=True)
    with small_disk(folder, size):
        fail(config, version=5)
        assert re.search(f"could not be recovered .*{words}", capsys.readouterr().err)
        assert not list(folder.glob("recovered*"))


def flip(path):
    content = bytearray(path.read_bytes())
    content[-70] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(("damage", "words"), [
    (lambda p: flip(p / "model.safetensors"), r"model.safetensors is damaged: .* manifest's, in lm_head.weight\."),
    (lambda p: (p / "model.safetensors").write_bytes((p / "model.safetensors").read_bytes()[:-9]),
     r"model.safetensors has \d+ bytes, \d+ were written, in model.norm.weight, lm_head.weight\."),
    (lambda p: save_file({"lm_head.weight": TENSORS["lm_head.weight"]}, p / "model.safetensors"),
     r"model.safetensors has \d+ bytes, \d+ were written, in model.norm.weight\."),
    (lambda p: (p / "model.safetensors").unlink(), r"model.safetensors is missing, in"),
    (lambda p: (p / "tensors.json").unlink(), r"tensors.json is missing\."),
    (lambda p: (p / "manifest.json").write_text("{}"), r"manifest.json is damaged"),
])
@pytest.mark.parametrize("checkpoint", [True, False])
def test_damage_is_named_with_the_way_without_them(config, damage, words, checkpoint, capsys):
    with opened(config) as store:
        if checkpoint:
            save(store, config, 3)
        fail(config, version=5)
        damage(store.folder / "recovered")
        way = "Go on without them with --resume step_3" if checkpoint else "Remove .*recovered to begin anew"
        with pytest.raises(CheckpointError, match=f"{words}.*{way}"):
            find_start(store, config, "latest")
        if checkpoint:
            capsys.readouterr()
            assert find_start(store, config, "step_3") == Start(3, store.folder / "step_3", 3, stream=Stream(30))
            assert re.search(r"are not used; they are now in .*recovered_(step_5|damaged)", capsys.readouterr().err)
            assert find_start(store, config, "latest") == Start(3, store.folder / "step_3", 3, stream=Stream(30))


def test_weights_of_another_order_of_prompts_are_refused(config):
    with opened(config) as store:
        fail(config, version=5)
        assert read_manifest(store.folder / "recovered").contents.position == position(config, 50)
        with pytest.raises(UsageError, match="seed = 2, the checkpoint was made with 1"):
            find_start(store, config.model_copy(update={"seed": 2}), "latest")


def carried(version):
    """A group of which weights `version` have generated one token."""
    begun = Trajectory("4/7/0", "7", "t", (1, 2), (1, 3), ())
    finished = replace(begun, trajectory_id="4/7/1", turns=(
        Turn((5,), (-1.0,), (), "answer", "stop", (VersionSpan(version, 0, 1),)),))
    request = RolloutRequest("7", Task("t", "q", ("a", "b"), 1, (3,)), 2, "a")
    return Started(request, (Unfinished(begun, (4,), (-0.5,), (VersionSpan(version, 0, 1),),
                                        np.arange(12, dtype=np.int16).reshape(2, 2, 3)), finished))


def test_carried_groups_go_with_the_weights_that_go_on_with_them(config, capsys):
    """Those of the recovered weights, not those of the older checkpoint."""
    config = config.model_copy(update={"rollout": config.rollout.model_copy(
        update={"over_sampling": 1.5, "max_staleness": 2})})
    kept = Stream(50, (carried(3),))
    with opened(config) as store:
        save(store, config, 3)
        with publisher(5) as source, pytest.raises(ZeroDivisionError), \
                leaving_weights(source, store.folder, config, lambda: kept):
            raise ZeroDivisionError
        assert recovery.problems(store.folder / "recovered") == []
        assert find_start(store, config, "latest").stream == kept
        strict = config.model_copy(update={"rollout": config.rollout.model_copy(update={"max_staleness": 1})})
        with pytest.raises(UsageError, match=r"max_staleness = 1, but the checkpoint carries 1 groups whose oldest "
                                             r"tokens are up to 2 weight versions behind: set it to at least 2"):
            find_start(store, strict, "latest")
        flip(store.folder / "recovered" / "carried.json")
        with pytest.raises(CheckpointError, match="carried.json is damaged"):
            find_start(store, config, "latest")

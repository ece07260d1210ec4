"""Checkpoints that Megatron-core itself writes are read, and those written here are loaded by Megatron-core."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open

from megatron_pbsd import losses
from megatron_pbsd.checkpointing.torch_dist import Reader
from megatron_pbsd.config import LearnerConfig, ModelConfig, ParallelConfig, SFTConfig
from megatron_pbsd.models import family
from megatron_pbsd.models.dist_checkpoint import places
from megatron_pbsd.models.hf_config import read
from tests.distributed.test_layouts import ONE

METADATA = {"singleton_local_shards": False}


def megatron_saves(rank, rendezvous, model, layout, target, layer_axis):
    """Megatron-core's own save of a GPTModel."""
    from megatron.core import dist_checkpointing

    from megatron_pbsd.learner.state import InProcessSave

    with learner(rank, rendezvous, model, layout) as built:
        metadata = METADATA | {"non_homogeneous_layers": not layer_axis}
        state = {f"model{i}": chunk.sharded_state_dict(metadata=dict(metadata))
                 for i, chunk in enumerate(built._chunks)}
        dist_checkpointing.save(state, str(target), InProcessSave(), content_metadata=metadata)


class learner:
    """One rank's, in a with statement."""

    def __init__(self, rank, rendezvous, model, layout, initial="load"):
        from megatron_pbsd.learner.learner import Learner

        self.made = Learner(rank, rendezvous, ModelConfig(path=str(model), initial_weights=initial),
                            LearnerConfig(parallel=layout), losses.build(SFTConfig()), seed=3, total_steps=1)

    def __enter__(self):
        return self.made

    def __exit__(self, *_):
        self.made.close()


def hf_weights(folder):
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize(("model", "layout", "layer_axis"), [
    ("tied", ONE, True), ("untied", ParallelConfig(world_size=2, tp=2), False),
    ("tied", ParallelConfig(world_size=2, tp=1, pp=2, vpp=2), False),
    ("moe", ParallelConfig(world_size=2, tp=1, ep=2), False), ("glm", ParallelConfig(world_size=2, tp=2, ep=2), False),
], ids=str)
def test_what_megatron_saves_lies_where_the_map_says(ranks, folders, tmp_path, model, layout, layer_axis):
    (tmp_path / "saved").mkdir()
    ranks.run(megatron_saves, layout.world_size, folders[model], layout, tmp_path / "saved", layer_axis)
    reader, hf = Reader(tmp_path / "saved"), read(folders[model])
    weights = hf_weights(folders[model])
    found = places(family(hf).decoder(hf), layer_axis)
    assert {place.key for parts in found.values() for place in parts} == set(reader.tensors)
    for name, parts in found.items():
        value = torch.full_like(weights[name], torch.nan)
        for place in parts:
            assert reader.tensors[place.key].shape == place.shape
            size = [s.stop - s.start for s in place.hf_index]
            size = [1] * (len(place.shape) - len(size)) + size
            box = tuple(slice(o, o + n) for o, n in zip(place.offset, size, strict=True))
            value[place.hf_index] = reader.read(place.key, box).view(value[place.hf_index].shape)
        assert torch.equal(value, weights[name]), name
    assert reader.damaged() == []

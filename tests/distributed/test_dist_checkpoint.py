"""Checkpoints that Megatron-core itself writes are read, and those written here are loaded by Megatron-core."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open

from megatron_pbsd import losses
from megatron_pbsd.checkpointing.conversion.driver import convert
from megatron_pbsd.checkpointing.conversion.locate import locate
from megatron_pbsd.checkpointing.conversion.reshard import Reshard
from megatron_pbsd.checkpointing.conversion.to_hf import ToHf
from megatron_pbsd.checkpointing.conversion.to_megatron import ToMegatron
from megatron_pbsd.checkpointing.torch_dist import Reader
from megatron_pbsd.config import LearnerConfig, ModelConfig, ParallelConfig, SFTConfig
from megatron_pbsd.models import family
from megatron_pbsd.models.dist_checkpoint import places
from megatron_pbsd.models.hf_config import read
from tests.distributed.layouts import DENSE, MOE, ONE

METADATA = {"singleton_local_shards": False}


def megatron_saves(rank, rendezvous, model, layout, target, layer_axis):
    """Megatron-core's own save of a GPTModel."""
    from megatron.core import dist_checkpointing

    from tests.distributed.megatron_save import InProcessSave

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


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(("model", "layout", "layer_axis"), [
    ("tied", ONE, True), ("untied", DENSE["tp2"], False), ("tied", DENSE["pp2vpp2"], False), ("moe", MOE["ep2"], False),
    ("glm", ParallelConfig(world_size=2, tp=2, ep=2), False),
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
    convert(ToHf(tmp_path / "saved", config=folders[model]), tmp_path / "exported")
    assert_same(hf_weights(tmp_path / "exported"), weights)


def test_rows_beyond_the_vocabulary_are_not_exported(ranks, folders, tmp_path):
    """131 rows, of which two ranks hold 66 each."""
    (tmp_path / "saved").mkdir()
    ranks.run(megatron_saves, 2, folders["odd"], DENSE["tp2"], tmp_path / "saved", False)
    assert Reader(tmp_path / "saved").tensors["embedding.word_embeddings.weight"].shape == (132, 32)
    convert(Reshard(tmp_path / "saved", ParallelConfig(world_size=2, tp=1, pp=2), config=folders["odd"]),
            tmp_path / "two")
    convert(ToHf(tmp_path / "two", config=folders["odd"]), tmp_path / "exported")
    assert_same(hf_weights(tmp_path / "exported"), hf_weights(folders["odd"]))


FUSED = {
    "self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
    "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_"}
"""Norms of latent attention as Megatron-core's own layers name them, and as Transformer Engine's do. (Of other layers
Megatron-core translates these names itself.)"""


def megatron_loads(rank, rendezvous, model, layout, checkpoint):
    """Names of parameters and buffers that Megatron-core's own load fills otherwise than the learner does."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.utils import apply_prefix_mapping
    from megatron.core.dist_checkpointing.validation import StrictHandling

    with learner(rank, rendezvous, model, layout) as built:
        expected = [{name: tensor.clone() for name, tensor in held(chunk)} for chunk in built._chunks]
        for chunk in built._chunks:
            for _, tensor in held(chunk):
                tensor.data.fill_(7)
        state = {f"model{i}": chunk.sharded_state_dict(metadata=METADATA | {"non_homogeneous_layers": True})
                 for i, chunk in enumerate(built._chunks)}
        hf = read(model)
        if hf["model_type"] == "deepseek_v3":
            for layer in range(hf["num_hidden_layers"]):
                dense = layer < hf["first_k_dense_replace"]
                names = FUSED | ({"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"} if dense else {})
                apply_prefix_mapping(state, {f"decoder.layers.{layer}.{a}": f"decoder.layers.{layer}.{b}"
                                             for a, b in names.items()})
        loaded = dist_checkpointing.load(state, str(checkpoint), strict=StrictHandling.RAISE_UNEXPECTED)
        for i, chunk in enumerate(built._chunks):
            chunk.load_state_dict(loaded[f"model{i}"])
        return [name for chunk, values in zip(built._chunks, expected, strict=True)
                for name, tensor in held(chunk) if not torch.equal(tensor, values[name])]


def held(chunk):
    """What checkpoints keep of a chunk."""
    kept = chunk.state_dict()
    return [(name, tensor) for name, tensor in (*chunk.named_parameters(), *chunk.named_buffers()) if name in kept]


@pytest.mark.parametrize(("model", "layout", "files"), [
    ("tied", DENSE["pp2vpp2"], 1), ("odd", DENSE["tp2"], 3), ("moe", MOE["ep2"], 3),
    ("glm", ParallelConfig(world_size=2, tp=2, ep=2), 1), ("deepseek", DENSE["tp2"], 2),
    ("deepseek-plain", MOE["ep2"], 1),
], ids=str)
def test_megatron_loads_what_is_converted(ranks, folders, tmp_path, model, layout, files):
    convert(ToMegatron(folders[model]), tmp_path / "checkpoint")
    if files > 1:
        convert(Reshard(tmp_path / "checkpoint", count=files), tmp_path / "other")
    checkpoint = locate(tmp_path / ("other" if files > 1 else "checkpoint"))
    found = ranks.run(megatron_loads, layout.world_size, folders[model], layout, checkpoint)
    assert found == [[]] * layout.world_size

"""A committed checkpoint as a Hugging Face folder: bit for bit the weights that the learner was given."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_pbsd import losses
from megatron_pbsd.checkpointing.errors import CheckpointError
from megatron_pbsd.checkpointing.hf_export import export_checkpoint
from megatron_pbsd.checkpointing.torch_dist import assemble, writer_name
from megatron_pbsd.config import LearnerConfig, ModelConfig, SFTConfig
from tests.distributed.layouts import DENSE, MOE

LAYOUTS = {**DENSE, **MOE}


def save(rank, rendezvous, folder, layout, saved):
    from megatron_pbsd.learner.learner import Learner

    learner = Learner(rank, rendezvous, ModelConfig(path=str(folder)),
                      LearnerConfig(parallel=LAYOUTS[layout], micro_batch_tokens=48), losses.build(SFTConfig()),
                      seed=1, total_steps=1)
    try:
        learner.save(saved)
        learner.saved()
    finally:
        learner.close()


@pytest.mark.parametrize(("layout", "model"), [("tp2pp2", "tied"), ("tp2", "untied"), ("tp2ep2", "glm")])
def test_export_gives_back_what_was_loaded(ranks, folders, tmp_path, layout, model):
    saved, size = tmp_path / "learner", LAYOUTS[layout].world_size
    ranks.run(save, size, folders[model], layout, str(saved))
    assemble(saved, [writer_name(rank) for rank in range(size)])
    origin = Path(folders[model])
    export_checkpoint(saved, origin, tmp_path / "exported")
    expected, found = load_file(origin / "model.safetensors"), load_file(tmp_path / "exported" / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_a_tensor_that_the_checkpoint_lacks_is_named(ranks, folders, tmp_path):
    saved = tmp_path / "learner"
    ranks.run(save, 2, folders["untied"], "tp2", str(saved))
    assemble(saved, [writer_name(rank) for rank in range(2)])
    larger = shutil.copytree(folders["untied"], tmp_path / "larger")
    config = json.loads((larger / "config.json").read_text())
    config |= {"num_hidden_layers": 5, "layer_types": [*config["layer_types"], config["layer_types"][0]]}
    (larger / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"decoder.layers.4"):
        export_checkpoint(saved, larger, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()

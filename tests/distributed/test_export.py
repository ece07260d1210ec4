"""A committed checkpoint as a Hugging Face folder: bit for bit the weights that the learner was given."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from synthetic_run import run_config

from megatron_pbsd import losses
from megatron_pbsd.checkpointing.errors import CheckpointError
from megatron_pbsd.checkpointing.fsck import LEARNER
from megatron_pbsd.checkpointing.hf_export import export_checkpoint
from megatron_pbsd.checkpointing.torch_dist import assemble, writer_name
from megatron_pbsd.components import exporter
from megatron_pbsd.config import LearnerConfig, ModelConfig, SFTConfig
from tests.distributed.layouts import DENSE, MOE, ONE

LAYOUTS = {"one": ONE, **DENSE, **MOE}


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


@pytest.mark.parametrize(("layout", "model"), [
    ("tp2pp2", "tied"), ("tp2", "untied"), ("tp2ep2", "glm"), ("tp2", "deepseek-plain")])
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


def test_a_model_that_the_checkpoint_is_not_of_is_named(ranks, folders, tmp_path):
    saved = tmp_path / "learner"
    ranks.run(save, 2, folders["untied"], "tp2", str(saved))
    assemble(saved, [writer_name(rank) for rank in range(2)])
    larger = shutil.copytree(folders["untied"], tmp_path / "larger")
    config = json.loads((larger / "config.json").read_text())
    config |= {"num_hidden_layers": 5, "layer_types": [*config["layer_types"], config["layer_types"][0]]}
    (larger / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="num_hidden_layers = 5, not 4"):
        export_checkpoint(saved, larger, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


def test_exports_go_with_their_checkpoints(ranks, folders, tmp_path):
    def config(when):
        return run_config(name="run", steps=6, runs=str(tmp_path), model={"path": str(folders["tied"])},
                          checkpoint={"export_hf": when})

    assert [exporter(config("never"), 6), exporter(config("final"), 4)] == [None, None]
    checkpoints = tmp_path / "run" / "checkpoints"
    for step in (2, 4):
        ranks.run(save, 1, folders["tied"], "one", str(checkpoints / f"step_{step}" / LEARNER))
        assemble(checkpoints / f"step_{step}" / LEARNER, [writer_name(0)])
        exporter(config("every"), step)(checkpoints / f"step_{step}")
    assert {path.name for path in (tmp_path / "run").glob("exported*")} == {"exported_step_2", "exported_step_4"}
    (checkpoints / "step_4").rename(checkpoints / "step_6")
    shutil.rmtree(checkpoints / "step_2")
    exporter(config("final"), 6)(checkpoints / "step_6")
    assert [path.name for path in (tmp_path / "run").glob("exported*")] == ["exported"]
    (checkpoints / "step_6" / LEARNER / "__0_0.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"step_6 is complete, but could not be exported to .*__0_0.distcp is m"):
        exporter(config("final"), 6)(checkpoints / "step_6")
    assert (tmp_path / "run" / "exported" / "model.safetensors").exists()

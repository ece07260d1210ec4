"""`pbsd checkpoint`: what is there and why, and what is wrong with it."""

from __future__ import annotations

import json

import pytest
import torch

from launcher.bench.checkpoint import RANKS, write_part
from launcher.cli import main
from megatron_pbsd.checkpointing import recovery
from megatron_pbsd.checkpointing.fsck import LEARNER
from megatron_pbsd.checkpointing.manifest import Contents
from megatron_pbsd.checkpointing.store import CheckpointStore
from megatron_pbsd.checkpointing.torch_dist import writer_name
from megatron_pbsd.config import CheckpointConfig
from megatron_pbsd.resharding.checksum import checksum

POLICY = {"keep": 1, "keep_every": 2, "best": {"metric": "eval/f1"}}


@pytest.fixture
def run(tmp_path):
    """A run's folder after four checkpoints, and one that was never finished."""
    with CheckpointStore(tmp_path / "checkpoints", CheckpointConfig(**POLICY), 30.0) as store:
        for step, f1 in enumerate((0.5, 0.1, 0.2, 0.3, 0.1), start=1):
            contents, writers = Contents(step, metrics={"eval/f1": f1}), list(map(writer_name, range(RANKS)))
            with store.writing(contents, 0, writers) as made:
                (made / LEARNER).mkdir()
                for rank in range(RANKS):
                    write_part(made / LEARNER, rank, step, 0)
        store.finish()
    (tmp_path / "checkpoints" / "step_6.00.partial").mkdir()
    (tmp_path / "checkpoints" / "step_6.00.partial" / "half").write_text("half")
    (tmp_path / "config.yaml").write_text(json.dumps({"checkpoint": POLICY}))
    return tmp_path


def said(capsys, *arguments):
    code = main(["checkpoint", *map(str, arguments)])
    return code, capsys.readouterr().out


def test_list_says_what_is_there_and_why_it_stays(run, capsys):
    code, text = said(capsys, "list", run, "--json")
    found = {one["name"]: one for one in json.loads(text)}
    assert code == 0 and {name: one["kept"] for name, one in found.items()} == {
        "step_1": ["best"], "step_2": ["every 2"], "step_4": ["every 2"], "step_5": ["newest"], "step_6.00.partial": []}
    assert {one["state"] for name, one in found.items() if name != "step_6.00.partial"} == {"complete"}
    assert found["step_6.00.partial"]["state"] == "partial" and found["step_6.00.partial"]["bytes"] == 4
    files = (run / "checkpoints" / "step_5").rglob("*")
    assert found["step_5"]["bytes"] == sum(p.stat().st_size for p in files if p.is_file() and p.name != "manifest.json")
    assert 0 <= found["step_5"]["age_s"] < 600
    _, table = said(capsys, "list", run / "checkpoints")
    assert "step_4" in table and "every 2" in table and "partial" in table


def test_without_a_configuration_the_pointers_say_why(run, capsys):
    (run / "config.yaml").unlink()
    (run / "checkpoints" / "step_2" / "manifest.json").write_text("{}")
    found = {one["name"]: one for one in json.loads(said(capsys, "list", run, "--json")[1])}
    assert found["step_5"]["kept"] == ["newest"] and found["step_1"]["kept"] == ["best"]
    assert found["step_2"]["state"] == "damaged"


def test_verify_names_file_and_tensor_and_fails(run, capsys):
    checkpoints = run / "checkpoints"
    assert said(capsys, "verify", run)[0] == 0
    part = checkpoints / "step_4" / LEARNER / "__1_0.distcp"
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 16
    part.write_bytes(content)
    code, text = said(capsys, "verify", run)
    assert code == 1 and "step_5: good" in text and "step_4: damaged" in text
    assert f"{part} is damaged: its checksum differs from the manifest's, in tensor.1\n" in text
    assert said(capsys, "verify", checkpoints / "step_5")[0] == 0
    code, text = said(capsys, "verify", checkpoints / "step_4", "--json")
    (one,) = json.loads(text)
    assert code == 1 and one["checkpoint"] == str(checkpoints / "step_4") and "tensor.1" in one["problems"][0]


def test_recovered_weights_are_listed_and_verified(run, capsys):
    tensors = {"w": torch.arange(100.0), "b": torch.ones(3)}
    kept = recovery.keep(run / "checkpoints", Contents(7), tensors, {n: checksum(t) for n, t in tensors.items()}, run)
    found = {one["name"]: one for one in json.loads(said(capsys, "list", run, "--json")[1])}
    assert (found["recovered"]["step"], found["recovered"]["state"]) == (7, "weights")
    assert said(capsys, "verify", run)[0] == 0
    content = bytearray((kept / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (kept / "model.safetensors").write_bytes(content)
    code, text = said(capsys, "verify", run)
    assert code == 1 and "model.safetensors is damaged" in text and "manifest's, in b" in text


def test_a_folder_without_checkpoints_is_said(tmp_path, capsys):
    assert main(["checkpoint", "list", str(tmp_path)]) == 2
    assert "has no checkpoints" in capsys.readouterr().err
    assert main(["checkpoint", "verify", str(tmp_path / "none")]) == 2
    assert "does not exist" in capsys.readouterr().err

"""What is wrong with a source is named, and no target is made of it."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import TINY, tiny_config

from megatron_pbsd.checkpointing.conversion.compare import damage, differences
from megatron_pbsd.checkpointing.conversion.driver import convert
from megatron_pbsd.checkpointing.conversion.locate import locate
from megatron_pbsd.checkpointing.conversion.reshard import Reshard
from megatron_pbsd.checkpointing.conversion.to_hf import ToHf
from megatron_pbsd.checkpointing.conversion.to_megatron import ToMegatron
from megatron_pbsd.checkpointing.errors import CheckpointError
from megatron_pbsd.checkpointing.torch_dist import Reader, write_common
from megatron_pbsd.config import ParallelConfig
from megatron_pbsd.errors import PbsdError
from megatron_pbsd.models import family
from megatron_pbsd.models.dist_checkpoint import units
from megatron_pbsd.models.hf_config import read
from tests.checkpointing.tiny_conversions import (
    SMALL,
    assert_same,
    change_config,
    change_weights,
    copy,
    weights,
)

QKV = "model.layers.0.self_attn.q_proj.weight"
FC2 = "decoder.layers.1.mlp.linear_fc2.weight"


@pytest.mark.parametrize(("change", "words"), [
    (lambda f: change_config(f, model_type="qwen33"), "'qwen33' is not implemented; .*did you mean 'qwen3'"),
    (lambda f: change_config(f, num_hidden_layers=5, layer_types=["full_attention"] * 5),
     r"(?s)11 problems:.*weights in .*: model.layers.4.input_layernorm.weight is missing.*layers.4.mlp"),
    (lambda f: change_config(f, intermediate_size=40), r"gate_proj.weight has shape \(48, 32\), .* implies \(40, 32\)"),
    (lambda f: change_config(f, dtype="bfloat16"), "says dtype = 'bfloat16', but 47 tensors are float32, .*--dtype"),
    (lambda f: change_weights(f, lambda w: w.update({QKV: w[QKV].to(torch.int8)})),
     f"{QKV} is int8; supported: float32, bfloat16, float16"),
    (lambda f: [change_weights(f, lambda w: w.update({QKV: w[QKV].half()})), change_config(f, dtype=None)],
     f"{QKV}, .*k_proj.weight, .* are one tensor to Megatron, but of several dtypes"),
    (lambda f: change_weights(f, lambda w: w.update({QKV: w[QKV].half()})), "but 1 tensors are float16, .*q_proj"),
    (lambda f: change_weights(f, lambda w: w.pop(QKV)), f"{QKV} is missing"),
    (lambda f: change_weights(f, lambda w: w.update({QKV + "s": w.pop(QKV)})),
     f"(?s){QKV} is missing; did you mean {QKV}s.*{QKV}s is unexpected; did you mean {QKV}"),
    (lambda f: os.truncate(f / "model.safetensors", 100_000), "model.safetensors is truncated: .* model.layers"),
    (lambda f: (f / "model.safetensors").unlink(), "has neither model.safetensors nor"),
    (lambda f: shutil.rmtree(f), "config.json does not exist"),
])
def test_bad_sources_are_named_before_anything_is_written(models, tmp_path, change, words):
    hf = copy(models["qwen3"][0], tmp_path / "hf")
    change(hf)
    with pytest.raises(CheckpointError, match=words):
        convert(ToMegatron(hf), tmp_path / "target")
    assert [p.name for p in tmp_path.iterdir()] in (["hf"], [])


@pytest.mark.parametrize("model_type", [
    name if name in ("qwen3", "glm4_moe") else pytest.param(name, marks=pytest.mark.slow) for name in TINY])
def test_a_config_that_lies_is_refused_or_means_the_same_tensors(models, model_type):
    """Every field, one at a time: what does not concern the weights cannot be seen in them."""
    hf, megatron = models[model_type]
    truth = tiny_config(model_type)
    refused = set()
    for field, value in truth.items():
        for lie in {None, 0, -1, 3, True, "no", value * 2 if isinstance(value, int) else 0.5}:
            with TemporaryDirectory() as folder:
                (Path(folder) / "config.json").write_text(json.dumps(truth | {field: lie}))
                for path in hf.glob("*.safetensors*"):
                    (Path(folder) / path.name).symlink_to(path)
                for conversion in (ToMegatron(Path(folder)), ToHf(megatron, config=Path(folder))):
                    if problems := conversion.problems():
                        refused.add(field)
                        assert re.search(r"config\.json|weight|bias|model", " ".join(problems)), (field, lie, problems)
                    else:
                        found = read(Path(folder))
                        assert units(family(found).decoder(found)) == units(family(truth).decoder(truth)), (field, lie)
    assert refused >= {"model_type", "hidden_size", "num_hidden_layers", "num_key_value_heads", "vocab_size"}


def test_an_output_layer_that_is_the_embedding_may_be_there(models, tmp_path):
    """Some writers keep the copy."""
    hf = copy(models["odd"][0], tmp_path / "hf")
    change_weights(hf, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))
    assert ToMegatron(hf).problems() == []
    change_weights(hf, lambda w: w["lm_head.weight"][7].neg_())
    (problem,) = ToMegatron(hf).problems()
    assert "lm_head.weight is not model.embed_tokens.weight" in problem
    assert damage(hf) == [f"{hf}: lm_head.weight is not model.embed_tokens.weight, but config.json says "
                          "tie_word_embeddings = true"]


def test_a_layout_is_checked_before(models, tmp_path):
    with pytest.raises(CheckpointError, match=r"tp = 4 does not divide .*valid for this model: \[1, 2\]"):
        convert(ToMegatron(models["qwen3"][0], layout=ParallelConfig(world_size=4, tp=4)), tmp_path / "target")


def test_a_target_that_exists_stays(models, tmp_path):
    (tmp_path / "target").mkdir()
    with pytest.raises(CheckpointError, match="target exists already"):
        convert(ToMegatron(models["qwen3"][0]), tmp_path / "target")


def test_too_little_space_is_said_before(models, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(CheckpointError, match=r"needs \d+ bytes, 1 are free"):
        convert(ToMegatron(models["qwen3"][0]), tmp_path / "target")
    assert not (tmp_path / "target").exists()


def flip(path, needle):
    """One bit in the middle of where these bytes stand, in a file."""
    data = bytearray(path.read_bytes())
    data[data.index(needle) + len(needle) // 2] ^= 4
    path.write_bytes(data)


def elements(megatron, key):
    """Bytes of the first part of a tensor."""
    reader = Reader(locate(megatron))
    return reader.part(reader.tensors[key].parts[0]).numpy().tobytes()


def test_flipped_bits_in_a_checkpoint_are_all_named(models, tmp_path):
    megatron = copy(models["qwen3"][1], tmp_path / "megatron")
    file = locate(megatron) / "__0_0.distcp"
    other = "decoder.final_layernorm.weight"
    for key in (FC2, other):
        flip(file, elements(models["qwen3"][1], key))
    for conversion in (ToHf(megatron), Reshard(megatron, count=2)):
        with pytest.raises(CheckpointError) as caught:
            convert(conversion, tmp_path / "target")
        assert re.search(rf"__0_0.distcp: {FC2} at .*, {other} at .* are damaged", str(caught.value)), caught.value
        assert not (tmp_path / "target").exists()
    assert len(damage(megatron)) == 2


@pytest.mark.parametrize("flips", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_bit_flipped_anywhere_in_a_checkpoint_is_named_or_means_nothing(models, tmp_path, flips):
    hf, megatron = models["qwen3_moe"][0], copy(models["qwen3_moe"][1], tmp_path / "megatron")
    files = sorted(path for path in megatron.rglob("*") if path.is_file())
    draw, named = random.Random(flips), 0
    for _ in range(flips):
        path = draw.choice(files)
        intact = path.read_bytes()
        position = draw.randrange(len(intact))
        flipped = intact[position] ^ 1 << draw.randrange(8)
        path.write_bytes(intact[:position] + bytes([flipped]) + intact[position + 1:])
        target = tmp_path / "target"
        try:
            convert(ToHf(megatron, **SMALL), target)
        except PbsdError as error:
            named += 1
            assert path.name in str(error) or (path.suffix == ".json" and "is not what" in str(error)), (path, error)
            assert not target.exists()
        else:
            assert_same(hf, target)
            assert json.loads((target / "config.json").read_text()) == json.loads((hf / "config.json").read_text())
            shutil.rmtree(target)
        path.write_bytes(intact)
    assert named > flips // 2


@pytest.mark.parametrize(("change", "words"), [
    (lambda f: os.truncate(f / "__0_0.distcp", 60_000), "__0_0.distcp: decoder"),
    (lambda f: (f / "__0_0.distcp").unlink(), "__0_0.distcp"),
    (lambda f: (f / "metadata.json").unlink(), "is no checkpoint"),
    (lambda f: (f / ".metadata").unlink(), r"\.metadata is missing or damaged"),
    (lambda f: flip(f / "common.pt", b"content_metadata"), "common.pt is missing or damaged"),
    (lambda f: flip(f / ".metadata", b"decoder.final_layernorm.weight"),
     r"\.metadata is missing or damaged|is missing"),
    (lambda f: change_config(f / "hf", num_hidden_layers=3, layer_types=["full_attention"] * 3),
     "decoder.layers.3.mlp.linear_fc1.weight .* is unexpected"),
    (lambda f: change_config(f / "hf", intermediate_size=24), r"linear_fc2.weight has shape \[32, 48\], .*\[32, 24\]"),
])
def test_bad_checkpoints_are_named(models, tmp_path, change, words):
    megatron = copy(models["qwen3"][1], tmp_path / "megatron")
    change(megatron / "release")
    with pytest.raises(CheckpointError, match=words):
        convert(ToHf(megatron), tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_the_wrong_model_is_named(models, tmp_path):
    with pytest.raises(CheckpointError, match="is of a qwen3 model, .* of a glm4_moe one"):
        convert(ToHf(models["glm4_moe"][1], config=models["qwen3"][0]), tmp_path / "target")
    other = copy(models["qwen3"][0], tmp_path / "other")
    change_config(other, vocab_size=63, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    with pytest.raises(CheckpointError, match="is another model than .*: vocab_size = 63, not 64; rope_theta = 500000"):
        convert(ToHf(models["qwen3"][1], config=other), tmp_path / "target")
    with pytest.raises(CheckpointError, match="is no checkpoint: .*; did you mean megatron?"):
        locate(models["qwen3"][1].parent)


def test_rows_that_are_no_padding_are_not_dropped(models, tmp_path):
    """A checkpoint that does not say what it is of, and a config.json with too small a vocabulary."""
    megatron = copy(models["qwen3"][1] / "release", tmp_path / "megatron")
    hf = copy(models["qwen3"][0], tmp_path / "hf")
    shutil.rmtree(megatron / "hf")
    (megatron / "checksums.json").unlink()
    write_common(megatron, {})
    change_config(hf, vocab_size=60)
    with pytest.raises(CheckpointError, match="(?s)2 problems.*embeddings.weight has 64 rows, .* vocab_size = 60, and"):
        convert(ToHf(megatron, config=hf), tmp_path / "target")


def test_flipped_bits_in_a_folder_with_checksums_are_named(models, tmp_path):
    convert(ToHf(models["qwen3"][1]), tmp_path / "hf")
    flip(tmp_path / "hf/model.safetensors", weights(models["qwen3"][0])[QKV].numpy().tobytes())
    assert damage(tmp_path / "hf") == [f"{tmp_path}/hf/model.safetensors: {QKV} is not what checksums.json says"]
    with pytest.raises(CheckpointError, match=f"model.safetensors: {QKV} is not what checksums.json says"):
        convert(ToMegatron(tmp_path / "hf"), tmp_path / "target")
    found, _ = differences(tmp_path / "hf", models["qwen3"][1])
    assert found == [f"{QKV} differs in 1 elements"]


def test_flipped_bits_in_the_cache_of_the_hub_are_named(models, tmp_path):
    """The hub names a file by its sha256, to which a snapshot has a link."""
    snapshot, source = tmp_path / "snapshots" / "main", models["qwen3"][0]
    copy(source, snapshot)
    data = (source / "model.safetensors").read_bytes()
    blob = tmp_path / hashlib.sha256(data).hexdigest()
    (snapshot / "model.safetensors").rename(blob)
    (snapshot / "model.safetensors").symlink_to(blob)
    assert damage(snapshot) == []
    flip(blob, weights(source)[QKV].numpy().tobytes())
    assert damage(snapshot) == [f"{snapshot}/model.safetensors is not what was published: its sha256 is not its name "
                                "in the hub's cache"]


def test_differences_are_named(models, tmp_path):
    hf = copy(models["qwen3"][0], tmp_path / "hf")
    change_weights(hf, lambda w: w.update(
        {QKV: -w[QKV], "x": torch.zeros(1), "lm_head.weight": w["lm_head.weight"][1:]}))
    found, _ = differences(hf, models["qwen3"][0])
    assert sorted(found) == [
        f"lm_head.weight is float32 [63, 32] in {hf}, float32 [64, 32] in {models['qwen3'][0]}",
        f"{QKV} differs in 2048 elements", f"x is in {hf} only"]


def test_zeros_of_either_sign_and_nans_are_bits(models, tmp_path):
    for name, values in {"a": [0.0, float("nan")], "b": [-0.0, float("nan")]}.items():
        (tmp_path / name).mkdir()
        save_file({"x": torch.tensor(values)}, tmp_path / name / "model.safetensors")
    assert differences(tmp_path / "a", tmp_path / "b")[0] == ["x differs in 1 elements"]
    assert differences(tmp_path / "a", tmp_path / "a")[0] == []

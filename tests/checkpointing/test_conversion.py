"""Conversions there and back are bit-identical, or end with a message and no target."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import TINY, make_tiny, tiny_config

from launcher.cli import main
from megatron_pbsd.checkpointing.conversion.compare import damage, differences
from megatron_pbsd.checkpointing.conversion.driver import convert
from megatron_pbsd.checkpointing.conversion.inspect import inspect
from megatron_pbsd.checkpointing.conversion.locate import locate
from megatron_pbsd.checkpointing.conversion.plan import balanced, box_steps
from megatron_pbsd.checkpointing.conversion.reshard import Reshard
from megatron_pbsd.checkpointing.conversion.to_hf import ToHf
from megatron_pbsd.checkpointing.conversion.to_megatron import ToMegatron
from megatron_pbsd.checkpointing.errors import CheckpointError
from megatron_pbsd.checkpointing.torch_dist import Reader, Writer, assemble, write_common
from megatron_pbsd.config import ParallelConfig
from megatron_pbsd.errors import PbsdError
from megatron_pbsd.models import family
from megatron_pbsd.models.dist_checkpoint import units
from megatron_pbsd.models.hf_config import read

SMALL = {"piece_bytes": 1000}
MODELS = {name: (name, {}) for name in TINY} | {
    "odd": ("qwen3", {"tie_word_embeddings": True, "vocab_size": 131, "num_hidden_layers": 5})}
"""name → family, and what differs from its tiny model."""
DENSE = ParallelConfig(world_size=4, tp=2, pp=2)
LAYOUTS = {
    "mixtral": ParallelConfig(world_size=4, tp=2, ep=4),
    "qwen3_moe": ParallelConfig(world_size=4, tp=1, pp=2, vpp=2, ep=2),
    "glm4_moe": ParallelConfig(world_size=4, tp=2, ep=2, pp=2)}
"""DENSE for the others."""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """name → its folder and the checkpoint made of it."""
    made = {}
    for name, (model_type, changes) in MODELS.items():
        folder = tmp_path_factory.mktemp(name)
        (make_tiny(model_type, folder / "hf", **changes) / "tokenizer.json").write_text("{}")
        convert(ToMegatron(folder / "hf", **SMALL), folder / "megatron")
        made[name] = folder / "hf", folder / "megatron"
    return made


def weights(folder):
    found = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def assert_same(a, b):
    one, other = weights(a), weights(b)
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]), name


def copy(folder, target):
    shutil.copytree(folder, target)
    return target


@pytest.mark.parametrize("model", MODELS)
def test_there_and_back(models, tmp_path, model):
    hf, megatron = models[model]
    convert(ToHf(megatron, shard_bytes=70_000, **SMALL), tmp_path / "back")
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 2
    assert_same(hf, tmp_path / "back")
    assert (tmp_path / "back" / "tokenizer.json").read_text() == "{}"
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "back" / name).read_text()) == json.loads((hf / name).read_text())
    assert damage(tmp_path / "back") == damage(megatron) == []
    found, count = differences(megatron, hf)
    assert found == [] and count == len(weights(hf))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back"]


@pytest.mark.parametrize("model", MODELS)
def test_transformers_loads_an_export(models, tmp_path, model):
    from transformers import AutoModelForCausalLM

    hf, megatron = models[model]
    convert(ToHf(megatron, shard_bytes=70_000), tmp_path / "back")
    loaded, told = AutoModelForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(told.values()), told
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, AutoModelForCausalLM.from_pretrained(hf)(tokens).logits)


@pytest.mark.parametrize("model", MODELS)
def test_other_files_hold_the_same(models, tmp_path, model):
    """One per rank, then three, then a Hugging Face folder."""
    hf, megatron = models[model]
    layout = LAYOUTS.get(model, DENSE)
    convert(Reshard(megatron, layout, **SMALL), tmp_path / "ranks")
    reader = Reader(locate(tmp_path / "ranks"))
    assert {p.file for t in reader.tensors.values() for p in t.parts} == {f"__{i}_0.distcp" for i in range(4)}
    assert reader.objects.keys() == Reader(locate(megatron)).objects.keys()
    convert(Reshard(tmp_path / "ranks", count=3), tmp_path / "three")
    assert len(list(locate(tmp_path / "three").glob("*.distcp"))) == 3
    for folder in ("ranks", "three"):
        found, count = differences(tmp_path / folder, megatron)
        assert found == [] and count == len(reader.tensors) and damage(tmp_path / folder) == []
    convert(ToHf(tmp_path / "three"), tmp_path / "back")
    assert_same(hf, tmp_path / "back")


def run_checkpoint(folder, hf):
    """A checkpoint as runs have them: with optimizer state, a value head, a generator's state and padded vocabulary."""
    source = Reader(locate(hf))
    folder.mkdir()
    writer, padding = Writer(folder, "__0_0"), {}
    for key, tensor in source.tensors.items():
        whole = source.read(key, tuple(slice(0, n) for n in tensor.shape))
        if key in ("embedding.word_embeddings.weight", "output_layer.weight"):
            whole = padding[key] = torch.cat([whole, torch.zeros(6, whole.shape[1])])
        writer.tensor(key, whole.shape, [0] * whole.dim(), whole)
        moment = torch.rand(whole.shape)
        writer.tensor(f"optimizer.state.exp_avg.{key}", whole.shape, [0] * whole.dim(), moment)
    writer.tensor("value_head.weight", (1, 32), (0, 0), torch.rand(1, 32))
    writer.object("rng/0", {"torch": torch.get_rng_state()})
    writer.close()
    model = json.loads((locate(hf) / "hf/config.json").read_text())
    write_common(folder, {"layout": {"tp": 2}, "model": model, "x": 1})
    assemble(folder, ["__0_0"])
    return folder


def test_resharding_leaves_nothing_out(models, tmp_path):
    hf, megatron = models["qwen3_moe"]
    source = run_checkpoint(tmp_path / "run", megatron)
    convert(Reshard(source, LAYOUTS["qwen3_moe"], **SMALL), tmp_path / "ranks")
    assert differences(source, tmp_path / "ranks")[0] == []
    one, other = Reader(source), Reader(tmp_path / "ranks")
    assert torch.equal(one.object("rng/0")["torch"], other.object("rng/0")["torch"])
    assert one.common() == other.common()
    for key in ("decoder.layers.0.mlp.experts.experts.linear_fc1.weight", "embedding.word_embeddings.weight"):
        parts, moments = other.tensors[key].parts, other.tensors[f"optimizer.state.exp_avg.{key}"].parts
        assert {p.file: p.offset for p in parts} == {p.file: p.offset for p in moments}
    convert(ToHf(tmp_path / "ranks"), tmp_path / "back")  # without the rows beyond the vocabulary
    assert_same(hf, tmp_path / "back")
    summary = inspect(source)
    assert (summary.kind, summary.model_type, summary.layout, summary.objects) == (
        "megatron", "qwen3_moe", {"tp": 2}, 1)


def test_dtype_is_cast_where_asked(models, tmp_path):
    hf, _ = models["glm4_moe"]
    convert(ToMegatron(hf, dtype="bfloat16", **SMALL), tmp_path / "megatron")
    convert(ToHf(tmp_path / "megatron"), tmp_path / "back")
    assert json.loads((tmp_path / "back/config.json").read_text())["dtype"] == "bfloat16"
    found = weights(tmp_path / "back")
    for name, tensor in weights(hf).items():
        kept = name.endswith("e_score_correction_bias")
        assert torch.equal(found[name], tensor if kept else tensor.bfloat16()), name
    convert(ToHf(tmp_path / "megatron", dtype="float32"), tmp_path / "wide")
    assert all(t.dtype == torch.float32 for t in weights(tmp_path / "wide").values())


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def change_weights(folder, change):
    found = weights(folder)
    change(found)
    save_file(found, folder / "model.safetensors")


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
        assert all(f"__0_0.distcp: {key} at" in str(caught.value) for key in (FC2, other)), caught.value
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


def program(*lines):
    return [sys.executable, "-c", "\n".join([
        "import sys; from pathlib import Path",
        "from megatron_pbsd.checkpointing.conversion.driver import convert",
        "from megatron_pbsd.checkpointing.conversion.to_hf import ToHf",
        "from megatron_pbsd.checkpointing.conversion.to_megatron import ToMegatron",
        "from megatron_pbsd.checkpointing.conversion.reshard import Reshard", *lines])]


def test_a_disk_that_fills_up_half_way(models, tmp_path):
    """A limit on the size of files is the full disk that one process can have."""
    target = tmp_path / "target"
    done = subprocess.run(program(
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))",
        f"convert(ToMegatron(Path({str(models['qwen3'][0])!r})), Path({str(target)!r}))"),
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert re.search(r"CheckpointError: .*target.partial: the disk is full: .* needs about 190\d+ bytes", done.stderr)
    assert not target.exists()
    convert(ToMegatron(models["qwen3"][0]), target)
    assert damage(target) == []


def test_processes_share_the_work_and_one_that_dies_is_missed(models, tmp_path):
    source, target = models["glm4_moe"][1], tmp_path / "target"
    done = subprocess.run(program(
        "if __name__ == '__main__':",  # the second time with a conversion that has files open
        f"    conversion = ToHf(Path({str(source)!r}), shard_bytes=40_000, piece_bytes=1000)",
        f"    print(convert(conversion, Path({str(target)!r}), processes=3))",
        "    import psutil",
        "    killed = []",
        "    def stop(done, total):",  # once the other process, a child of the server, is there
        "        while not killed:",
        "            killed.extend(p for server in psutil.Process().children() for p in server.children())",
        "            [p.kill() for p in killed]",
        f"    convert(conversion, Path({str(tmp_path / 'other')!r}), processes=2, progress=stop)"),
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True, text=True, check=False,
        timeout=120)
    assert "CheckpointError: a process of the conversion was killed" in done.stderr, done.stderr
    assert not (tmp_path / "other").exists()
    assert "processes=3" in done.stdout, done.stderr
    assert_same(models["glm4_moe"][0], target)


def trials(tmp_path, models, count, seed):
    """Conversions that are killed with SIGKILL at their nth file operation, each then continued."""
    return subprocess.run(
        [sys.executable, str(Path(__file__).with_name("kill_trials.py")), str(models["qwen3"][0]),
         str(models["qwen3"][1]), str(tmp_path), str(count), str(seed)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("count", [6, pytest.param(50, marks=pytest.mark.slow)])
def test_a_killed_conversion_leaves_none_and_is_continued(models, tmp_path, count):
    done = trials(tmp_path, models, count, seed=count)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["killed"] >= count // 2 and told["kept"] > 0 and told["trials"] == count


def test_what_an_interrupted_conversion_left_is_checked(models, tmp_path):
    """A bit flipped in a finished file is found, and the file written again."""
    source, target = models["qwen3"][1], tmp_path / "target"
    conversion = ToHf(source, shard_bytes=60_000)

    class Stop(Exception):
        pass

    def progress(done, total):
        if done > total * 0.7:
            raise Stop

    with pytest.raises(Stop):
        convert(conversion, target, processes=1, progress=progress)
    finished = sorted(p for p in (tmp_path / "target.partial").glob("*.safetensors"))
    with finished[0].open("r+b") as file:
        file.seek(-5, os.SEEK_END)
        file.write(b"\x13")
    done = convert(conversion, target, processes=1)
    assert 0 < done.kept < len(finished)
    assert_same(models["qwen3"][0], target)


def test_another_conversion_does_not_use_what_one_left(models, tmp_path):
    def stop(done, total):
        if done > total * 0.7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(ToHf(models["qwen3"][1], shard_bytes=60_000), tmp_path / "target", progress=stop)
    assert convert(ToHf(models["qwen3"][1], shard_bytes=70_000), tmp_path / "target").kept == 0
    assert_same(models["qwen3"][0], tmp_path / "target")


def test_two_at_once_are_refused(models, tmp_path):
    refused = []

    def again(done, total):
        if not refused:
            with pytest.raises(CheckpointError, match="is being written by another process") as caught:
                convert(ToHf(models["qwen3"][1]), tmp_path / "target")
            refused.append(caught)

    convert(ToHf(models["qwen3"][1]), tmp_path / "target", progress=again)
    assert refused and damage(tmp_path / "target") == []


def test_groups_are_balanced_and_consecutive():
    assert balanced("abcdef", [3, 3, 3, 3, 3, 3], 9) == [["a", "b", "c"], ["d", "e", "f"]]
    assert balanced("abc", [1, 100, 1], 10)[0] == ["a"]
    assert balanced("ab", [1, 1], 10) == [["a", "b"]]


def test_steps_tile_a_box():
    box = (slice(2, 3), slice(1, 8), slice(0, 5))
    count = torch.zeros(4, 9, 5, dtype=torch.int)
    for step in box_steps(box, itemsize=4, piece_bytes=40):
        count[step] += 1
        assert count[step].numel() * 4 <= 40
    assert (count[box] == 1).all() and count.sum() == 35


def test_errors_are_the_projects(models, tmp_path):
    with pytest.raises(PbsdError):
        inspect(tmp_path)


def test_command_line(models, tmp_path, capsys):
    hf, run = str(models["qwen3_moe"][0]), lambda *words: main(["convert", *map(str, words)])
    assert run("hf-to-megatron", hf, tmp_path / "m", "--tp", "2", "--processes", "1") == 0
    assert run("reshard", tmp_path / "m", tmp_path / "r", "--tp", "2", "--ep", "2", "--pp", "2") == 0
    assert run("megatron-to-hf", tmp_path / "r", tmp_path / "hf", "--dtype", "bfloat16") == 0
    assert "in 1 files, checked" in capsys.readouterr().out
    assert run("verify", tmp_path / "r") == run("verify", tmp_path / "r", hf) == 0
    assert "113 tensors, bit-identical" in capsys.readouterr().out
    assert run("verify", tmp_path / "hf", hf) == 1
    assert "is bfloat16 [64, 32] in" in capsys.readouterr().out
    assert run("inspect", tmp_path / "r", "--json") == 0
    elements = sum(tensor.numel() for tensor in weights(models["qwen3_moe"][0]).values())
    assert json.loads(capsys.readouterr().out)["elements"] == elements
    assert run("hf-to-megatron", hf, tmp_path / "new", "--tp", "3") == 1
    assert "valid for this model: [1, 2]" in capsys.readouterr().err
    assert run("reshard", tmp_path / "m", tmp_path / "new") == 2



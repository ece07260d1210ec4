"""Conversions there and back are bit-identical, or end with a message and no target."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_disk import small_disk

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
from megatron_pbsd.errors import PbsdError
from tests.checkpointing.tiny_conversions import (
    DENSE,
    LAYOUTS,
    MODELS,
    SMALL,
    assert_same,
    weights,
)


@pytest.mark.parametrize("model", MODELS)
def test_there_and_back(models, tmp_path, model):
    hf, megatron = models[model]
    done = convert(ToHf(megatron, shard_bytes=70_000, section_bytes=20_000, **SMALL), tmp_path / "back")
    assert done.sections > len(list((tmp_path / "back").glob("*.safetensors"))) > 2
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


@pytest.mark.parametrize("make", [
    lambda hf, megatron: ToMegatron(hf, **SMALL), lambda hf, megatron: ToHf(megatron, **SMALL),
    lambda hf, megatron: Reshard(megatron, count=3, **SMALL)], ids=["import", "export", "reshard"])
def test_a_disk_that_others_fill_up(models, tmp_path, make):
    """A small disk of its own; there is room before, and none after the first piece."""
    hf, megatron = models["qwen3"]
    disk = tmp_path / "disk"
    disk.mkdir()

    def fill(done, total):
        with contextlib.suppress(OSError), (disk / "other").open("ab", buffering=0) as other:
            while other.write(bytes(4096)):
                pass

    with small_disk(disk, "17m"):
        with pytest.raises(CheckpointError, match="disk/target.partial: the disk is full: .* needs about 1"):
            convert(make(hf, megatron), disk / "target", progress=fill)
        assert not (disk / "target").exists()
        (disk / "other").unlink()
        convert(make(hf, megatron), disk / "target")
        assert damage(disk / "target") == [] and differences(disk / "target", hf)[0] == []


def test_processes_share_the_work_and_one_that_dies_is_missed(models, tmp_path):
    source, target = models["glm4_moe"][1], tmp_path / "target"
    done = subprocess.run(program(
        "if __name__ == '__main__':",  # the second time with a conversion that has files open
        f"    conversion = ToHf(Path({str(source)!r}), section_bytes=40_000, piece_bytes=1000)",
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


def trials(tmp_path, model, count, processes):
    """Conversions that are killed with SIGKILL at their nth file operation, each then continued."""
    return subprocess.run(
        [sys.executable, str(Path(__file__).with_name("kill_trials.py")), *map(str, model), str(tmp_path), str(count),
         str(count), str(processes)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("model", "count", "processes"), [
    ("qwen3", 6, 1), pytest.param("qwen3", 50, 1, marks=pytest.mark.slow),
    pytest.param("deepseek_v3", 50, 1, marks=pytest.mark.slow),
    pytest.param("glm4_moe", 8, 2, marks=pytest.mark.slow)])
def test_a_killed_conversion_leaves_none_and_is_continued(models, tmp_path, model, count, processes):
    done = trials(tmp_path, models[model], count, processes)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["killed"] >= count // 2 and told["kept"] > 0 and told["trials"] == count


def test_what_an_interrupted_conversion_left_is_checked(models, tmp_path):
    """A bit flipped in a finished file is found, and the file written again."""
    source, target = models["qwen3"][1], tmp_path / "target"
    conversion = ToHf(source, shard_bytes=60_000, section_bytes=30_000)

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
    with finished[1].open("r+b") as file:  # in the header
        file.seek(20)
        file.write(b"\x13")
    known = len(list((tmp_path / "target.partial").glob("*.digests")))
    done = convert(conversion, target, processes=1)
    assert done.kept == known - 2 > 0
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
    assert "in 1 sections, checked" in capsys.readouterr().out
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

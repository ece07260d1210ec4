"""Hugging Face folders: read as safetensors reads them, written so that it does, and everything wrong is named."""

from __future__ import annotations

import json
import re
import struct

import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file

from megatron_pbsd.checkpointing.hf_folder import INDEX, HfFile, HfFolder, stored, write_index
from megatron_pbsd.models.errors import ModelError

TENSORS = {
    "a.weight": torch.arange(12.0).view(3, 4), "b": torch.arange(5, dtype=torch.bfloat16),
    "c": torch.tensor(7, dtype=torch.int64), "d": torch.zeros(0, 3),
    "e": torch.arange(6, dtype=torch.float16).view(2, 3)}


def whole(shape):
    return tuple(slice(0, n) for n in shape)


@pytest.fixture
def sharded(tmp_path):
    """Two files of safetensors' own."""
    files = {"model-00001-of-00002.safetensors": ["a.weight", "b"], "model-00002-of-00002.safetensors": ["c", "d", "e"]}
    for file, names in files.items():
        save_file({name: TENSORS[name] for name in names}, tmp_path / file)
    write_index(tmp_path, files, 0, {})
    return tmp_path


def test_what_safetensors_writes_is_read(sharded):
    folder = HfFolder(sharded)
    assert folder.tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(folder.read(name, whole(tensor.shape)), tensor)
    assert torch.equal(folder.read("a.weight", (slice(1, 3), slice(2, 3))), TENSORS["a.weight"][1:3, 2:3])
    folder.release()
    assert torch.equal(folder.read("b", (slice(0, 5),)), TENSORS["b"])


@settings(max_examples=40)
@given(shapes=st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=5),
       dtypes=st.lists(st.sampled_from([torch.float32, torch.bfloat16, torch.uint8]), min_size=5, max_size=5))
def test_safetensors_reads_what_is_written(tmp_path_factory, shapes, dtypes):
    folder = tmp_path_factory.mktemp("written")
    tensors = {f"t{i}": torch.randint(0, 100, shape).to(dtype) for i, (shape, dtype) in enumerate(
        zip(shapes, dtypes, strict=False))}
    file = HfFile(folder / "model.safetensors", {name: (t.dtype, t.shape) for name, t in tensors.items()})
    for tensor in tensors.values():
        file.write(tensor)
    file.close()
    for read in (load_file(folder / "model.safetensors"),
                 {name: HfFolder(folder).read(name, whole(t.shape)) for name, t in tensors.items()}):
        assert read.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor)


def header_of(path):
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(path, change):
    header, data = header_of(path)
    change(header)
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def in_index(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(("damage", "words"), [
    (lambda f: (f / SECOND).unlink(), f"{SECOND} is missing"),
    (lambda f: (f / FIRST).write_bytes((f / FIRST).read_bytes()[:-1]), f"{FIRST} is truncated: .* b ends at"),
    (lambda f: (f / FIRST).write_bytes((f / FIRST).read_bytes()[:40]), f"{FIRST} is truncated or damaged: its header"),
    (lambda f: (f / FIRST).write_bytes(b""), f"{FIRST} is truncated or damaged"),
    (lambda f: (f / FIRST).write_bytes((f / FIRST).read_bytes() + b"x"), f"{FIRST} has 1 bytes after its last tensor"),
    (lambda f: with_header(f / FIRST, lambda h: h["b"].update(dtype="Q4")), f"{FIRST}: b is Q4; known are"),
    (lambda f: with_header(f / FIRST, lambda h: h["b"].update(shape=[4])), f"{FIRST}: b has bytes .* expected 8"),
    (lambda f: with_header(f / FIRST, lambda h: h["b"].pop("shape")), f"{FIRST}: the header's entry of b is damaged"),
    (lambda f: with_header(f / FIRST, lambda h: h["b"].update(data_offsets=[0, 10])), f"{FIRST}: a.weight has bytes"),
    (lambda f: (f / INDEX).write_text("{"), "index.json is damaged"),
    (lambda f: (f / INDEX).write_text('{"weight_map": {}}'), "index.json is damaged"),
    (lambda f: in_index(f, lambda m: m.update(a=FIRST)), f"a is said to be in {FIRST}, which lacks it"),
    (lambda f: in_index(f, lambda m: m.update(c=FIRST)), f"c is said to be in {FIRST}, which lacks it"),
    (lambda f: in_index(f, lambda m: m.pop("e")), f"does not name e, which is in {SECOND}"),
    (lambda f: save_file(TENSORS, f / SECOND), f"{SECOND}: b is in {FIRST} too"),
    (lambda f: [(f / INDEX).unlink(), (f / "pytorch_model.bin").touch()], "but .*pytorch_model.bin"),
])
def test_damage_is_named(sharded, damage, words):
    damage(sharded)
    with pytest.raises(ModelError, match=words):
        HfFolder(sharded)


def test_all_problems_at_once(sharded):
    (sharded / SECOND).unlink()
    with_header(sharded / FIRST, lambda h: h["b"].update(dtype="Q4"))
    with pytest.raises(ModelError, match=f"(?s)b is Q4.*{SECOND} is missing"):
        HfFolder(sharded)


def test_a_flipped_bit_in_a_header_is_an_error_or_another_name(sharded):
    """safetensors has no checksums: a header that was changed to another valid one is no longer that model's."""
    path = sharded / FIRST
    intact = path.read_bytes()
    length = 8 + struct.unpack("<Q", intact[:8])[0]
    expected = {name: tuple(TENSORS[name].shape) for name in TENSORS}
    refused = 0
    for position in range(length):
        damaged = bytearray(intact)
        damaged[position] ^= 1 << position % 7
        path.write_bytes(damaged)
        try:
            read = stored(sharded, expected, lambda name: False)
            for name in ("a.weight", "b"):
                value = read(name, whole(TENSORS[name].shape))
                # What is left is a dtype of the same size, which callers check.
                assert value.dtype != TENSORS[name].dtype or torch.equal(value, TENSORS[name]), (position, name)
        except ModelError:
            refused += 1
    assert refused > length // 2


def test_names_and_shapes_that_are_not_the_models(sharded):
    shapes = {"a.weight": (3, 5), "b": (5,), "c": (), "f": (1,), "d.weightx": (0, 3)}
    with pytest.raises(ModelError) as caught:
        stored(sharded, shapes, lambda name: name == "e")
    for words in (r"f is missing", r"a\.weight has shape \(3, 4\), config.json implies \(3, 5\)", "d is unexpected"):
        assert re.search(words, str(caught.value)), caught.value
    assert "e is unexpected" not in str(caught.value)

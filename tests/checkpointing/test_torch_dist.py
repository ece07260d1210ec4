"""Megatron's checkpoint format: read and written as torch.distributed.checkpoint does, and every damage is named."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shutil
import zipfile
from enum import Enum
from math import prod

import pytest
import torch
import torch.distributed.checkpoint as torch_checkpoint
from hypothesis import given, settings, strategies as st

from megatron_pbsd.checkpointing import archive
from megatron_pbsd.checkpointing.errors import CheckpointError
from megatron_pbsd.checkpointing.torch_dist import Reader, Writer, assemble, unfinished, write_common
from megatron_pbsd.checkpointing.torch_dist_index import METADATA

DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.uint8]


def whole(shape):
    return tuple(slice(0, n) for n in shape)


def random_tensor(shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (prod(shape) * dtype.itemsize,), generator=generator, dtype=torch.uint8).view(
        dtype).view(shape)


def same(a, b):
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(
        a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


def write(folder, tensors, writers=2, objects=()):
    """Each tensor's parts, (key, tensor, boxes), dealt to writers in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    made = [Writer(folder, f"__{i}_0") for i in range(writers)]
    turn = 0
    for key, tensor, boxes in tensors:
        for box in boxes:
            made[turn % writers].tensor(key, tensor.shape, [s.start for s in box], tensor[box])
            turn += 1
    for key, value in objects:
        made[-1].object(key, value)
    write_common(folder, {"step": 3})
    names = [writer.name for writer in made]
    assert unfinished(folder, names) == names
    for writer in made:
        writer.close()
    assert unfinished(folder, names) == []
    return assemble(folder, names)


@st.composite
def tilings(draw, shape):
    """Boxes that tile a tensor, made by cutting boxes in two."""
    boxes = [whole(shape)]
    for _ in range(draw(st.integers(0, 6))):
        box = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        d = draw(st.integers(0, len(shape) - 1))
        if box[d].stop - box[d].start < 2:
            boxes.append(box)
            continue
        cut = draw(st.integers(box[d].start + 1, box[d].stop - 1))
        boxes += [(*box[:d], slice(box[d].start, cut), *box[d + 1:]), (*box[:d], slice(cut, box[d].stop), *box[d + 1:])]
    return boxes


@settings(max_examples=60)
@given(data=st.data(), shape=st.lists(st.integers(1, 5), min_size=1, max_size=4), dtype=st.sampled_from(DTYPES))
def test_any_box_of_any_tiling_is_read(tmp_path_factory, data, shape, dtype):
    folder = tmp_path_factory.mktemp("boxes")
    tensor, boxes = random_tensor(shape, dtype), data.draw(tilings(tuple(shape)))
    write(folder, [("a", tensor, boxes)], writers=data.draw(st.integers(1, 3)))
    reader = Reader(folder, checked=True)
    assert reader.incomplete() == [] and reader.damaged() == [] and reader.common() == {"step": 3}
    starts = [data.draw(st.integers(0, n - 1)) for n in shape]
    box = tuple(slice(start, data.draw(st.integers(start + 1, n))) for start, n in zip(starts, shape, strict=True))
    assert same(reader.read("a", box), tensor[box])
    shutil.rmtree(folder)


def test_torch_loads_what_is_written(tmp_path):
    tensors = {"a": random_tensor((6, 4), torch.bfloat16), "b.c": random_tensor((3, 2, 5), torch.float32, 1)}
    cut = [(slice(0, 2), slice(0, 4)), (slice(2, 6), slice(0, 1)), (slice(2, 6), slice(1, 4))]
    write(tmp_path / "c", [("a", tensors["a"], cut), ("b.c", tensors["b.c"], [whole((3, 2, 5))])],
          objects=[("o", [torch.zeros(0)])])
    loaded = {key: torch.zeros_like(tensor) for key, tensor in tensors.items()}
    torch_checkpoint.load(loaded, checkpoint_id=tmp_path / "c", no_dist=True)
    assert all(same(loaded[key], tensor) for key, tensor in tensors.items())
    assert len(Reader(tmp_path / "c").object("o")) == 1


def test_what_torch_saves_is_read(tmp_path):
    tensors = {"a": random_tensor((6, 4), torch.bfloat16), "b": random_tensor((), torch.float32)}
    torch_checkpoint.save(dict(tensors), checkpoint_id=tmp_path, no_dist=True)
    (tmp_path / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    reader = Reader(tmp_path, checked=True)
    assert all(same(reader.read(key, whole(tensor.shape)), tensor) for key, tensor in tensors.items())
    assert reader.damaged() == [] and reader.incomplete() == []


@pytest.fixture
def written(tmp_path):
    tensors = {"first": random_tensor((4, 8), torch.float32), "second": random_tensor((16,), torch.bfloat16, 1)}
    write(tmp_path, [(key, tensor, [whole(tensor.shape)]) for key, tensor in tensors.items()], writers=1,
          objects=[("third", {"x": 1})])
    return tmp_path, tensors


def test_a_flipped_bit_is_named_or_is_in_no_content(written):
    """Every 7th byte: zip archives have padding, names and times that say nothing of the tensor."""
    folder, tensors = written
    path = folder / "__0_0.distcp"
    intact = path.read_bytes()
    entries = {e.key: e for r in [Reader(folder)] for e in (*r.objects.values(), *(t.parts[0] for t in
               r.tensors.values()))}
    named = 0
    for position in range(0, len(intact), 7):
        damaged = bytearray(intact)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        key = next((k for k, e in entries.items() if e.start <= position < e.start + e.length), "between archives")
        reader = Reader(folder, checked=True)
        found = reader.damaged()
        named += len(found)
        assert all(re.search(rf"__0_0.distcp: {key}\b", problem) for problem in found), (position, found)
        for name, tensor in tensors.items():
            try:
                assert same(reader.read(name, whole(tensor.shape)), tensor), (position, name)
            except CheckpointError as error:
                assert found and name == key and re.search(rf"__0_0.distcp: {name} ", str(error)), (position, name)
    assert named > len(intact) // 7 // 4
    path.write_bytes(intact)


def test_a_bit_flipped_in_any_element_is_named(written):
    folder, tensors = written
    path = folder / "__0_0.distcp"
    intact = path.read_bytes()
    elements = tensors["first"].numpy().tobytes()
    start = intact.index(elements)
    for position in range(start, start + len(elements)):
        path.write_bytes(intact[:position] + bytes([intact[position] ^ 16]) + intact[position + 1:])
        assert Reader(folder).damaged() == [f"{path}: first at (0, 0) is damaged"]


@settings(max_examples=60)
@given(data=st.data(), dtype=st.sampled_from(DTYPES), before=st.integers(0, 100))
def test_elements_are_where_zipfile_finds_them(tmp_path_factory, data, dtype, before):
    """Of archives of torch's writer and of ours; and of damaged ones they are there, or not found."""
    tensor = random_tensor(data.draw(st.lists(st.integers(0, 4), max_size=3)), dtype)
    stream = io.BytesIO(bytes(before))
    stream.seek(before)
    data.draw(st.sampled_from([torch.save, archive.save]))(tensor, stream)
    saved = stream.getvalue()
    with zipfile.ZipFile(io.BytesIO(saved[before:])) as opened:
        record = next(info for info in opened.infolist() if info.filename.endswith("/data/0"))
        content = opened.read(record)
    start, length, checksum = archive.elements(saved, before, len(saved) - before)
    assert (saved[start : start + length], checksum) == (content, record.CRC)
    damaged = bytearray(saved)
    damaged[data.draw(st.integers(before, len(saved) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        found = archive.elements(bytes(damaged), before, len(saved) - before)
    except Exception:
        return
    assert before <= found.start <= found.start + found.length <= len(saved)


@pytest.mark.slow
def test_a_part_of_more_than_four_gigabytes(tmp_path):
    """Its archive has numbers of 64 bits."""
    large = torch.zeros((1 << 32) + 3, dtype=torch.uint8)
    large[-3:] = torch.tensor([1, 2, 3])
    write(tmp_path, [("large", large, [whole(large.shape)])], writers=1)
    reader = Reader(tmp_path, checked=True)
    last = (slice(len(large) - 5, len(large)),)
    assert reader.read("large", last).tolist() == [0, 0, 1, 2, 3]
    with (tmp_path / "__0_0.distcp").open("r+b") as file:
        file.seek(1 << 31)
        file.write(b"1")
    with pytest.raises(CheckpointError, match="large at .* is damaged"):
        Reader(tmp_path, checked=True).read("large", last)


def test_truncation_is_named(written):
    folder, tensors = written
    path = folder / "__0_0.distcp"
    intact = path.read_bytes()
    ends = {part.key: part.start + part.length for t in Reader(folder).tensors.values() for part in t.parts}
    for length in range(0, len(intact), 97):
        with path.open("r+b") as file:
            file.truncate(length)
        reader = Reader(folder, checked=True)
        lost = [key for key, end in ends.items() if end > length]
        found = "; ".join(reader.damaged())
        assert all(re.search(rf"__0_0.distcp: .*\b{key}\b", found) for key in lost)
        for key, tensor in tensors.items():
            if key in lost:
                with pytest.raises(CheckpointError, match="__0_0.distcp"):
                    reader.read(key, whole(tensor.shape))
            else:
                assert same(reader.read(key, whole(tensor.shape)), tensor)
        path.write_bytes(intact)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"__0_0.distcp is missing"):
        Reader(folder).read("first", whole((4, 8)))


@pytest.mark.parametrize(("boxes", "words"), [
    ([(slice(0, 2),)], r"x \[4\] lacks 2 of 4 elements"),
    ([(slice(0, 3),), (slice(2, 4),)], r"x \[4\] has the same elements twice: at \(0,\) in .*, at \(2,\)"),
    ([(slice(0, 2),), (slice(1, 2),), (slice(2, 4),)], r"the same elements twice: at \(0,\) in .*, at \(1,\)"),
])
def test_parts_that_do_not_tile_a_tensor_are_named(tmp_path, boxes, words):
    write(tmp_path / "c", [("x", torch.arange(4), boxes)])
    (problem,) = Reader(tmp_path / "c").incomplete()
    assert re.search(words, problem)


def test_a_part_that_is_written_twice_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"x at \(0,\) is in __0_0.distcp and in __1_0.distcp"):
        write(tmp_path / "c", [("x", torch.arange(4), [(slice(0, 2),), (slice(0, 4),)])])


def test_missing_elements_and_names_are_named(tmp_path):
    write(tmp_path / "c", [("weight", torch.arange(4), [(slice(0, 2),)])])
    with pytest.raises(CheckpointError, match="weight lacks 1 of 2 elements"):
        Reader(tmp_path / "c").read("weight", (slice(1, 3),))
    with pytest.raises(CheckpointError, match="has no tensor wieght; did you mean weight"):
        Reader(tmp_path / "c").read("wieght", (slice(1, 3),))


class Intruder:
    def __reduce__(self):
        return os.system, ("touch intruded",)


class EarlyPython(pickle.Pickler):
    """Members of enumerations as Python 3.11.2, which Debian 12 has, pickles them."""

    def reducer_override(self, value):
        return (getattr, (type(value), value.name)) if isinstance(value, Enum) else NotImplemented


class Reaching:
    def __reduce__(self):
        return getattr, (torch.Size, "__subclasses__")


def test_an_index_of_an_early_python_is_read(written):
    folder, tensors = written
    stream = io.BytesIO()
    EarlyPython(stream).dump(pickle.loads((folder / METADATA).read_bytes()))
    assert b"getattr" in stream.getvalue()
    (folder / METADATA).write_bytes(stream.getvalue())
    for name, tensor in tensors.items():
        assert same(Reader(folder).read(name, whole(tensor.shape)), tensor)


@pytest.mark.parametrize(("change", "words"), [
    (lambda f: (f / METADATA).write_bytes(pickle.dumps(Reaching())), r"__subclasses__ of .*Size.* has no place in"),
    (lambda f: (f / "metadata.json").unlink(), "is no distributed checkpoint: metadata.json"),
    (lambda f: (f / "metadata.json").write_text("{"), "is no distributed checkpoint: metadata.json"),
    (lambda f: (f / "metadata.json").write_text(json.dumps({"sharded_backend": "zarr"})),
     "'zarr' is not implemented; supported: 'torch_dist'"),
    (lambda f: (f / METADATA).unlink(), r"\.metadata is missing or damaged"),
    (lambda f: (f / METADATA).write_bytes((f / METADATA).read_bytes()[:-20]), r"\.metadata is missing or damaged"),
    (lambda f: (f / METADATA).write_bytes(pickle.dumps(Intruder())), r"posix.system has no place in"),
])
def test_foreign_and_damaged_indices_are_named(written, change, words, monkeypatch):
    monkeypatch.chdir(written[0])
    change(written[0])
    with pytest.raises(CheckpointError, match=words):
        Reader(written[0])
    assert not (written[0] / "intruded").exists()


def test_common_is_plain_data(written):
    (written[0] / "common.pt").write_bytes(pickle.dumps(Intruder()))
    with pytest.raises(CheckpointError, match=r"common.pt is missing or damaged"):
        Reader(written[0]).common()

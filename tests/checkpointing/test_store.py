"""The checkpoint store: complete or absent, verified, bounded in number, clear when the disk is full."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest

from megatron_pbsd.checkpointing.store import CheckpointError, CheckpointStore, read_manifest


def write(store, step, content=b"weights"):
    with store.writing(step, {"tp": 2}, expected_bytes=100) as folder:
        (folder / "learner").mkdir()
        (folder / "learner" / "rank_0.pt").write_bytes(content)
        (folder / "run.json").write_text("{}")


def test_write_and_read_back(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    assert store.newest() is None
    write(store, 3)
    path = store.newest()
    assert path.name == "step_3"
    assert (path / "learner" / "rank_0.pt").read_bytes() == b"weights"
    manifest = read_manifest(path)
    assert manifest.step == 3 and manifest.layout == {"tp": 2}
    assert set(manifest.files) == {"learner/rank_0.pt", "run.json"}
    assert manifest.files["learner/rank_0.pt"].size == 7


def test_only_the_newest_stay(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    for step in (2, 8, 10, 9):
        write(store, step)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_10", "step_9"]
    assert store.newest().name == "step_9"


def test_the_checkpoint_just_written_stays_even_before_later_steps(tmp_path):
    store = CheckpointStore(tmp_path, keep=1)
    write(store, 10)
    write(store, 9)
    assert store.newest().name == "step_9"
    assert not (tmp_path / "step_10").exists()


def test_rewriting_a_step_replaces_it(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    write(store, 1, b"old")
    write(store, 1, b"new")
    assert (store.newest() / "learner" / "rank_0.pt").read_bytes() == b"new"


def test_an_error_while_writing_leaves_the_previous_one(tmp_path):
    store = CheckpointStore(tmp_path, keep=1)
    write(store, 1)
    with pytest.raises(KeyError), store.writing(2, {}, 0) as folder:
        (folder / "half").write_text("half")
        raise KeyError
    assert store.newest().name == "step_1"
    assert not list(tmp_path.glob("*.partial"))


def test_a_killed_writer_leaves_the_previous_one(tmp_path):
    write(CheckpointStore(tmp_path, keep=1), 1)
    script = (
        "import os, sys\nfrom megatron_pbsd.checkpointing.store import CheckpointStore\n"
        f"with CheckpointStore({str(tmp_path)!r}, 1).writing(2, {{}}, 0) as f:\n"
        "    (f / 'half').write_text('x')\n    os._exit(9)\n")
    assert subprocess.run([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
                          check=False).returncode == 9
    store = CheckpointStore(tmp_path, keep=1)
    assert (tmp_path / "step_2.partial").is_dir()
    assert store.newest().name == "step_1"
    write(store, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_2"]


@pytest.mark.parametrize(("damage", "words"), [
    (lambda p: (p / "learner/rank_0.pt").unlink(), "rank_0.pt is missing"),
    (lambda p: (p / "learner/rank_0.pt").write_bytes(b"weightz"), "rank_0.pt is damaged"),
    (lambda p: (p / "learner/rank_0.pt").write_bytes(b"weigh"), "rank_0.pt has 5 bytes, 7 were written"),
    (lambda p: (p / "manifest.json").unlink(), "manifest.json is missing"),
    (lambda p: (p / "manifest.json").write_text("{"), "manifest.json is damaged"),
    (lambda p: p.rename(p.parent / "elsewhere"), "names step_1, which does not exist"),
])
def test_damage_is_named(tmp_path, damage, words):
    store = CheckpointStore(tmp_path, keep=1)
    write(store, 1)
    damage(tmp_path / "step_1")
    with pytest.raises(CheckpointError, match=words):
        store.newest()


def test_too_little_space_is_said_before_writing(tmp_path):
    store = CheckpointStore(tmp_path, keep=1)
    with pytest.raises(CheckpointError, match=r"needs about \d+ bytes, \d+ are free"), store.writing(1, {}, 1 << 60):
        pytest.fail("nothing may be written")
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_while_writing(tmp_path):
    store = CheckpointStore(tmp_path, keep=1)
    write(store, 1)
    with pytest.raises(CheckpointError, match="the disk is full: .* needs about 10 bytes"), \
            store.writing(2, {}, 10) as folder:
        (folder / "a").write_text("x")
        with open("/dev/full", "w") as full:
            full.write("x")
    assert store.newest().name == "step_1"


def test_other_os_errors_are_not_renamed(tmp_path):
    with pytest.raises(OSError) as caught, CheckpointStore(tmp_path, keep=1).writing(1, {}, 0):
        raise OSError(errno.EACCES, "no")
    assert not isinstance(caught.value, CheckpointError)

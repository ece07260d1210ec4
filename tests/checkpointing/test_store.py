"""The checkpoint store: complete or absent, verified, bounded in number, clear when something fails."""

from __future__ import annotations

import errno
import itertools
import multiprocessing
import os
import resource
import signal
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import xxhash
from small_disk import small_disk

from launcher.bench.checkpoint import RANKS, is_wrong, kill_trials, write_part
from megatron_pbsd.checkpointing.errors import CheckpointError
from megatron_pbsd.checkpointing.fsck import LEARNER, examine
from megatron_pbsd.checkpointing.manifest import Contents, read_manifest
from megatron_pbsd.checkpointing.store import CheckpointStore, complete
from megatron_pbsd.checkpointing.torch_dist import Reader, Writer, report_failure, write_common, writer_name
from megatron_pbsd.config import CheckpointConfig
from megatron_pbsd.errors import UsageError

WRITERS = [writer_name(rank) for rank in range(RANKS)]
PROCESSES = multiprocessing.get_context("fork")


@contextmanager
def open_store(folder, deadline_s=30.0, **policy):
    with CheckpointStore(folder, CheckpointConfig(**policy), deadline_s) as store:
        yield store


def start_ranks(partial: Path, step: int, generation: int = 0) -> list[multiprocessing.Process]:
    (partial / LEARNER).mkdir()
    ranks = [PROCESSES.Process(target=write_part, args=(partial / LEARNER, rank, step, generation))
             for rank in range(RANKS)]
    for rank in ranks:
        rank.start()
    return ranks


def save(store, step, generation=0, metrics=None, then=None):
    contents = Contents(step, {"tp": 2}, metrics or {}, {"generation": generation})
    with store.writing(contents, expected_bytes=100, writers=WRITERS, then=then) as partial:
        ranks = start_ranks(partial, step, generation)
    store.finish()
    for rank in ranks:
        rank.join()


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir() if not path.name.startswith("."))


def test_write_and_read_back(tmp_path):
    with open_store(tmp_path / "checkpoints") as store:
        assert store.newest() is None
        save(store, 3)
        path = store.newest()
    assert path.name == "step_3" and not is_wrong(path) and examine(path) == []
    manifest = read_manifest(path)
    assert manifest.contents == Contents(3, {"tp": 2}, {}, {"generation": 0})
    assert {"learner/__0_0.distcp", "learner/__1_0.distcp", "learner/.metadata", "learner/common.pt"} <= set(
        manifest.files)
    for name, record in manifest.files.items():
        assert record.checksum == xxhash.xxh3_128((path / name).read_bytes()).hexdigest(), name
    assert names(tmp_path / "checkpoints") == ["latest", "step_3"]
    assert manifest.nbytes == sum((path / name).stat().st_size for name in manifest.files)


def test_the_caller_goes_on_while_writers_write_and_the_next_one_waits(tmp_path):
    with open_store(tmp_path) as store:
        with store.writing(Contents(1), 0, ["one"]) as partial:
            (partial / LEARNER).mkdir()
            write_common(partial / LEARNER, {})
            writer = Writer(partial / LEARNER, "one")
        store.check()
        assert names(tmp_path) == [partial.name]
        waiting = threading.Thread(target=lambda: save(store, 2))
        waiting.start()
        writer.tensor("w", (2,), (0,), torch.ones(2))
        assert waiting.is_alive() and not list(tmp_path.glob("step_2*"))
        writer.close()
        waiting.join()
        assert names(tmp_path) == ["latest", "step_1", "step_2"]
        assert store.newest().name == "step_2"


def test_what_is_to_happen_then_sees_the_committed_checkpoint(tmp_path):
    seen = []
    with open_store(tmp_path, keep=1) as store:
        for step in (1, 2):
            save(store, step, then=lambda path: seen.append((path.name, is_wrong(path))))
    assert seen == [("step_1", False), ("step_2", False)]


def test_newest_multiples_and_best_stay(tmp_path):
    with open_store(tmp_path, keep=1, keep_every=4, best={"metric": "eval/f1"}) as store:
        for step, f1 in ((2, 0.3), (4, 0.1), (6, 0.7), (8, None), (10, 0.6), (9, 0.2)):
            save(store, step, metrics={} if f1 is None else {"eval/f1": f1})
        assert names(tmp_path) == ["best", "latest", "step_4", "step_6", "step_8", "step_9"]
        assert (store.select("latest").name, store.select("best").name) == ("step_9", "step_6")
        assert store.select("step_4").name == "step_4"
    with pytest.raises(UsageError, match=r"no checkpoint 'step_7'; have \['step_4', .*; the nearest is step_6"):
        store.select("step_7")


def test_rewriting_a_step_replaces_it(tmp_path):
    with open_store(tmp_path) as store:
        for generation in (1, 2):
            save(store, 1, generation)
        assert read_manifest(store.newest()).contents.position == {"generation": 2} and not is_wrong(store.newest())


def test_an_error_while_writing_leaves_the_previous_one(tmp_path):
    with open_store(tmp_path) as store:
        save(store, 1)
        with pytest.raises(KeyError), store.writing(Contents(2), 0) as folder:
            (folder / "half").write_text("half")
            raise KeyError
        assert store.newest().name == "step_1"
    assert names(tmp_path) == ["latest", "step_1"]


def test_a_writer_that_fails_is_named_at_the_next_call(tmp_path):
    with open_store(tmp_path) as store:
        save(store, 1)
        with store.writing(Contents(2), 0, WRITERS) as partial:
            (partial / LEARNER).mkdir()
            report_failure(partial / LEARNER, "__1_0", "OSError: [Errno 5] Input/output error")
        with pytest.raises(CheckpointError, match=r"__1_0 was not written: OSError: \[Errno 5\]"):
            store.finish()
        assert store.newest().name == "step_1"
    assert names(tmp_path) == ["latest", "step_1"]


def test_a_writer_that_hangs_is_named(tmp_path):
    with open_store(tmp_path, deadline_s=0.05) as store:
        with store.writing(Contents(2), 0, WRITERS) as partial:
            (partial / LEARNER).mkdir()
            write_part(partial / LEARNER, 0, 2, 0)
        with pytest.raises(CheckpointError, match=r"nothing was written for 0.05 s, .* \['__1_0'\]"):
            store.finish()


def test_ranks_that_do_not_make_a_whole_are_named(tmp_path):
    with open_store(tmp_path) as store:
        with store.writing(Contents(2), 0, WRITERS[:1]) as partial:
            (partial / LEARNER).mkdir()
            write_part(partial / LEARNER, 0, 2, 0)
        with pytest.raises(CheckpointError, match=r"tensor.0 \[64, 64\] lacks 2048 of 4096 elements"):
            store.finish()
    assert names(tmp_path) == []


def test_a_run_that_ends_early_gives_up_what_is_not_written_and_keeps_what_is(tmp_path):
    with open_store(tmp_path) as store:
        with store.writing(Contents(1), 0, WRITERS) as partial:
            for rank in start_ranks(partial, 1):
                rank.join()
    assert names(tmp_path) == ["latest", "step_1"]
    with open_store(tmp_path) as store:
        with store.writing(Contents(2), 0, WRITERS) as partial:
            (partial / LEARNER).mkdir()
    assert names(tmp_path) == ["latest", "step_1"]


def test_another_live_run_is_left_alone(tmp_path):
    with open_store(tmp_path) as store:
        with store.writing(Contents(1), 0) as partial:
            with pytest.raises(UsageError, match=rf"another run writes .* \(process {os.getpid()} on"):
                CheckpointStore(tmp_path, CheckpointConfig(), 1.0).__enter__()
            assert partial.is_dir()
            (partial / "run.json").write_text("{}")
    (tmp_path / "step_7.0a1b.partial").mkdir()
    with open_store(tmp_path):
        assert names(tmp_path) == ["latest", "step_1"]


@pytest.mark.parametrize(("damage", "words"), [
    (lambda p: (p / "learner/__0_0.distcp").unlink(),
     r"__0_0.distcp is missing, in tensor.0, tensor.1, tensor.2, rng/shard_0_2"),
    (lambda p: flip(p / "learner/__0_0.distcp"), r"__0_0.distcp is damaged: .* manifest's, in tensor.1\."),
    (lambda p: os.truncate(p / "learner/__1_0.distcp", 40000),
     r"__1_0.distcp has 40000 bytes, \d+ were written, in .*tensor.2, "),
    (lambda p: (p / "learner/.metadata").write_bytes(b""), r"\.metadata has 0 bytes"),
    (lambda p: (p / "manifest.json").unlink(), "manifest.json is missing"),
    (lambda p: (p / "manifest.json").write_text("{"), "manifest.json is damaged"),
    (lambda p: replace(p / "manifest.json", '"step": 2', '"step": 3'), "is not what its checksum was taken of"),
    (lambda p: (p / "learner/__2_0.distcp").write_text("x"), "__2_0.distcp is not in the manifest"),
    (lambda p: p.rename(p.parent / "elsewhere"), r"names step_2, which does not exist in .*; have \['step_1'\]"),
])
def test_damage_is_named_with_where_to_go_on_from(tmp_path, damage, words):
    with open_store(tmp_path) as store:
        for step in (1, 2):
            save(store, step)
    damage(tmp_path / "step_2")
    with pytest.raises(CheckpointError, match=words) as caught:
        store.newest()
    if (tmp_path / "step_2").exists():
        assert "go on from it with --resume step_1" in str(caught.value)
        assert examine(tmp_path / "step_2")
        (tmp_path / "step_1" / "learner" / "common.pt").write_bytes(b"")
        with pytest.raises(CheckpointError, match="No older checkpoint is good"):
            store.newest()


def flip(path, at=None):
    """One bit of a file, in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if at is None else at] ^= 1
    path.write_bytes(content)


def replace(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_each_flipped_bit_is_found_and_blamed_on_the_tensor_that_has_it(tmp_path):
    with open_store(tmp_path) as store:
        save(store, 1)
    folder = tmp_path / "step_1" / LEARNER
    reader = Reader(folder)
    parts = [part for stored in reader.tensors.values() for part in stored.parts if part.file == "__0_0.distcp"]
    path = folder / "__0_0.distcp"
    content = path.read_bytes()
    flips, found = range(0, len(content), 997), 0
    for at in flips:
        flip(path, at=at)
        problems = examine(tmp_path / "step_1")
        inside = [part for part in parts if part.start <= at < part.start + part.length]
        assert "__0_0.distcp is damaged" in problems[0]
        # Between the elements there are headers that no checksum but the file's is taken of.
        blamed = [part.key for part in parts if part.key in problems[0]]
        assert blamed in ([], [part.key for part in inside])
        found += bool(blamed)
        path.write_bytes(content)
    assert found > 0.8 * len(flips)


def test_too_little_space_is_said_before_writing(tmp_path):
    with open_store(tmp_path) as store:
        with pytest.raises(CheckpointError, match=r"needs about \d+ bytes, \d+ are free"), \
                store.writing(Contents(1), 1 << 60):
            pytest.fail("nothing may be written")
    assert names(tmp_path) == []


def test_a_disk_that_fills_up_while_writing(tmp_path):
    with open_store(tmp_path) as store:
        save(store, 1)
        with pytest.raises(CheckpointError, match="the disk is full: .* needs about 10 bytes"), \
                store.writing(Contents(2), 10) as folder:
            (folder / "a").write_text("x")
            with open("/dev/full", "w") as full:
                full.write("x")
        assert store.newest().name == "step_1"


def write_or_say_why(folder, rank, step, limit=None):
    """A rank of the learner, which leaves a word where it cannot write."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        write_part(folder, rank, step, 0)
    except OSError as error:
        report_failure(folder, writer_name(rank), str(error))


def test_a_disk_that_fills_up_under_the_ranks(tmp_path):
    """A small disk of its own: the second checkpoint does not fit beside the first one."""
    with small_disk(tmp_path, "200k"):
        with open_store(tmp_path) as store:
            save(store, 1)
            with store.writing(Contents(2), 10, WRITERS) as partial:
                (partial / LEARNER).mkdir()
                for rank in range(RANKS):
                    PROCESSES.Process(target=write_or_say_why, args=(partial / LEARNER, rank, 2)).start()
            with pytest.raises(CheckpointError, match="the disk is full: a checkpoint needs about 10 bytes"):
                store.finish()
            assert store.newest().name == "step_1" and not is_wrong(store.newest())
        assert names(tmp_path) == ["latest", "step_1"]


def test_a_rank_that_may_not_write_on(tmp_path):
    """RLIMIT_FSIZE: writing fails in the middle of a tensor."""
    with open_store(tmp_path) as store:
        with store.writing(Contents(2), 10, WRITERS) as partial:
            (partial / LEARNER).mkdir()
            for rank, limit in enumerate((None, 20000)):
                PROCESSES.Process(target=write_or_say_why, args=(partial / LEARNER, rank, 2, limit)).start()
        with pytest.raises(CheckpointError, match=r"__1_0 was not written: \[Errno 27\] File too large"):
            store.finish()
    assert names(tmp_path) == []


def test_other_os_errors_are_not_renamed(tmp_path):
    with open_store(tmp_path) as store, pytest.raises(OSError) as caught, store.writing(Contents(1), 0):
        raise OSError(errno.EACCES, "no")
    assert not isinstance(caught.value, CheckpointError)


FILE_OPERATIONS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.scandir")


def save_and_die(folder, step, operation, survived):
    """SIGKILL before file operation number `operation` of what follows the ranks' writing."""
    with open_store(folder, keep=1, best={"metric": "m", "direction": "min"}) as store:
        with store.writing(Contents(step, {}, {"m": float(step)}, {"generation": operation}), 0, WRITERS) as partial:
            (partial / LEARNER).mkdir()
            for rank in range(RANKS):
                write_part(partial / LEARNER, rank, step, generation=operation)
            number = itertools.count(1)
            sys.addaudithook(lambda event, _: event in FILE_OPERATIONS and next(number) == operation
                             and os.kill(os.getpid(), signal.SIGKILL))
        store.finish()
    survived.set()


@pytest.mark.parametrize("repeated", [False, True], ids=["next step", "same step"])
def test_a_kill_before_any_file_operation_leaves_a_right_newest_checkpoint(tmp_path, repeated):
    """The driver dies before the first, second, third … thing that committing does to the file system."""
    survived, step = PROCESSES.Event(), 1
    with open_store(tmp_path) as store:
        save(store, 1, metrics={"m": 0.0})
    for operation in itertools.count(1):
        following = step if repeated else step + 1
        driver = PROCESSES.Process(target=save_and_die, args=(tmp_path, following, operation, survived))
        driver.start()
        driver.join()
        with open_store(tmp_path) as store:
            newest = store.newest()
            assert read_manifest(newest).step in (step, following)
            assert not [path for path in complete(tmp_path) if is_wrong(path)]
            assert not list(tmp_path.glob("*.partial")) + list(tmp_path.glob("*.replaced"))
            step = read_manifest(newest).step
        if survived.is_set():
            break
    assert step == following and operation > 20


def test_a_kill_at_any_time_loses_nothing_that_was_committed(tmp_path):
    """`pbsd bench checkpoint` in short."""
    found = kill_trials(tmp_path, trials=4, seed=1)
    assert (found.trials, found.lost, found.wrong) == (4, 0, 0) and found.checkpoints

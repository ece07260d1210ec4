"""What goes wrong ends in one clear message, loses nothing that was finished, and leaves no process behind."""

from __future__ import annotations

import json
import os
import shutil
import signal

import pytest
from pbsd_process import INLINE, SMALL, none_left


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["learner-1", "engine-0"])
def test_a_component_that_dies_is_named_and_finished_trajectories_stay(pbsd, victim):
    run = pbsd(f"dies-{victim}", *SMALL, "--steps", "1000", "--checkpoint.every", "0")
    run.wait_for_step(2)
    family = run.family()
    run.component(victim).kill()
    code, errors = run.finish()
    assert code == 1
    assert f"{victim} died" in errors and "Traceback" not in errors
    assert none_left(family)
    done = max(row["step"] for row in run.rows())
    kept = sorted(path.name for path in (run.folder / "trajectories").glob("*.jsonl"))
    assert f"step_{done:06d}.jsonl" in kept
    for path in (run.folder / "trajectories").glob("*.jsonl"):
        for line in path.read_text().splitlines(keepends=True):
            assert not line.endswith("\n") or json.loads(line)
    if victim.startswith("learner"):
        # The rollout of the step that failed was complete: all of it is there, scored or not yet.
        files = [run.folder / "trajectories" / f"step_{done + 1:06d}{end}" for end in (".jsonl", ".unscored.jsonl")]
        assert 16 in [len(path.read_text().splitlines()) for path in files if path.exists()]
    assert (run.folder / "error.log").read_text()


@pytest.mark.slow
def test_a_killed_driver_leaves_nothing_behind_and_resumes_to_the_same_losses(pbsd):
    """SIGKILL after a checkpoint; the resumed run repeats what an uninterrupted one does."""
    options = (*SMALL, "--steps", "5", "--checkpoint.every", "2")
    whole = pbsd("whole", *options).succeed()
    run = pbsd("killed", *options)
    run.wait_for_step(3)
    family = run.family()
    run.process.kill()
    run.process.communicate()
    assert none_left(family)
    resumed = pbsd("killed", *options, "--resume").succeed()
    assert [row["step"] for row in resumed] == [row["step"] for row in whole]
    for ours, theirs in zip(resumed[1:], whole[1:], strict=True):
        for key in ("reward/mean", "loss/total", "grad_norm", "lr", "credit/evidence_per_token", "rollout/tokens"):
            # Bit for bit where a matrix product's bits do not depend on the batch; to rounding elsewhere.
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-6), (ours["step"], key)


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_stops_cleanly(pbsd, sent, code):
    run = pbsd(f"interrupted-{sent.name}", *SMALL, "--steps", "1000")
    run.wait_for_step(1)
    family = run.family()
    if sent == signal.SIGINT:
        # A terminal sends Ctrl-C to the whole group, Ray's servers and the actors too.
        os.killpg(run.process.pid, sent)
    else:
        run.process.send_signal(sent)
    assert run.finish()[0] == code
    assert none_left(family)


def test_a_corrupt_checkpoint_is_named(pbsd):
    options = (*SMALL, *INLINE, "--steps", "1")
    run = pbsd("corrupt", *options)
    run.succeed()
    damaged = max((run.folder / "checkpoints").rglob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    code, errors = pbsd("corrupt", *options, "--steps", "2", "--resume").finish()
    assert code == 1
    assert damaged.name in errors and "Traceback" not in errors


def test_a_full_disk_at_checkpoint_time_is_said(pbsd, tmp_path_factory):
    """More is asked for than the disk has: the run ends before it writes, and keeps its trajectories."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    disk = tmp_path_factory.mktemp("disk").resolve()
    if libc.mount(b"tmpfs", str(disk).encode(), b"tmpfs", 0, b"size=6m"):
        pytest.skip(f"mounting a small disk needs privileges: {os.strerror(ctypes.get_errno())}")
    try:
        run = pbsd("full", *SMALL, *INLINE, "--steps", "1", "--runs", str(disk))
        code, errors = run.finish()
        assert code == 1
        assert "checkpoint" in errors and "free" in errors and "Traceback" not in errors
        assert (disk / "full" / "trajectories" / "step_000001.jsonl").exists()
        assert not list((disk / "full" / "checkpoints").glob("step_*"))
    finally:
        libc.umount(str(disk).encode())
        shutil.rmtree(disk, ignore_errors=True)


@pytest.mark.parametrize(("options", "parts"), [
    (("--learner.paralel.tp", "2"), ("learner.paralel", "'parallel'", "command line")),
    (("--learner.parallel.world_size", "3"), ("world_size = 3", "tp * pp")),
    (("--learner.parallel.world_size", "8", "--learner.parallel.tp", "8"), ("learner.parallel.tp", "8")),
    (("--model.path", "assets/no_such_model"), ("model.path", "no_such_model")),
])
def test_what_cannot_work_is_said_before_anything_starts(pbsd, options, parts):
    run = pbsd("bad", *options)
    code, errors = run.finish()
    assert code == 2
    assert all(part in errors for part in parts), errors
    assert "Traceback" not in errors
    assert not run.folder.exists()


def test_a_taken_port_is_named_with_a_free_one(pbsd):
    import socket

    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, errors = pbsd("port", *SMALL, "--steps", "1", "--ray_port", str(port)).finish()
    assert code != 0
    assert f"ray_port = {port}" in errors and "free" in errors and "Traceback" not in errors

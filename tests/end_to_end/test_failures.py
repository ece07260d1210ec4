"""What goes wrong ends in one clear message, loses nothing that was finished, and leaves no process behind."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
from pbsd_process import INLINE, SMALL, is_alive, none_left
from safetensors.torch import load_file
from small_disk import small_disk

from megatron_pbsd.resharding.checksum import checksum
from megatron_pbsd.resharding.publication import Published

UNDISTURBED = (*SMALL, "--steps", "16", "--checkpoint.every", "0", "--rollout.policy", "longest_remaining")


@pytest.fixture(scope="module")
def undisturbed(pbsd):
    return pbsd("undisturbed", *UNDISTURBED).succeed()


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["learner-1", "engine-0"])
def test_a_component_that_dies_is_named_and_finished_trajectories_stay(pbsd, victim):
    run = pbsd(f"dies-{victim}", *SMALL, "--steps", "1000", "--checkpoint.every", "0", "--rollout.engine_restarts", "0")
    run.wait_for_step(2)
    family = run.family()
    run.component(victim).kill()
    code, errors = run.finish()
    assert code == 1
    assert f"{victim} died" in errors and "Traceback" not in errors
    assert none_left(family)
    done = max(row["step"] for row in run.rows())
    assert f"the weights of step {done}, which the learner has lost, were recovered from the engines" in errors
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
def test_engines_that_die_are_started_anew(pbsd, undisturbed):
    """SIGKILL to one while it has chunks, to the other after a rollout, then to both. The run comes to what it would
    have come to."""
    run = pbsd("engines-die", *UNDISTURBED, "--rollout.engine_restarts", "4")
    run.wait_for_step(1)
    wait_for_rollout_after(run, lambda: max(row["step"] for row in run.rows()))
    run.component("engine-0").kill()
    run.wait_for_step(max(row["step"] for row in run.rows()) + 2)
    wait_for_rollout_after(run, lambda: max(row["step"] for row in run.rows()), finished=16)
    run.component("engine-1").kill()
    run.wait_for_step(max(row["step"] for row in run.rows()) + 2)
    both = [run.component(name) for name in ("engine-0", "engine-1")]
    wait_for_rollout_after(run, lambda: max(row["step"] for row in run.rows()))
    for process in both:
        process.kill()
    code, errors = run.finish()
    assert code == 0, errors
    assert errors.count("engine-0 died: ") == errors.count("engine-1 died: ") == 2
    assert re.search(r"started anew( in \d+ s)?, which may happen 0 more times", errors)
    rows = run.rows()
    assert [row["step"] for row in rows] == [row["step"] for row in undisturbed]
    for ours, theirs in zip(rows[1:], undisturbed[1:], strict=True):
        for key in ("reward/mean", "loss/total", "grad_norm", "rollout/tokens"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-6), (ours["step"], key)
    lanes = [event["args"]["name"] for event in json.loads((run.folder / "trace.json").read_text())
             if event["name"] == "thread_name"]
    assert sorted(lanes) == ["engine-0", "engine-1"]
    assert not list(Path("/dev/shm").glob(f"pbsd-{run.process.pid}-*"))


@pytest.mark.slow
def test_engines_that_hang_are_started_anew(pbsd, undisturbed):
    """SIGSTOP to one while it has chunks, to the other after a rollout, so that weights cannot be given to it. The run
    comes to what it would have come to; a third hang ends it."""
    run = pbsd("engines-hang", *UNDISTURBED, "--rollout.deadline_s", "30")

    def done():
        return max(row["step"] for row in run.rows())

    run.wait_for_step(1)
    for victim, finished in (("engine-0", 1), ("engine-1", 16)):
        wait_for_rollout_after(run, done, finished)
        process = run.component(victim)
        process.send_signal(signal.SIGSTOP)
        run.wait_for_step(done() + 2)
        assert not is_alive(process)
    wait_for_rollout_after(run, done)
    run.component("engine-0").send_signal(signal.SIGSTOP)
    family = run.family()
    code, errors = run.finish()
    assert code == 1 and none_left(family)
    assert errors.count("engine-0 died: it hung, with no answer for 30 s") == 1
    assert errors.count("engine-1 died: it hung, with no answer for 30 s") == 1
    assert re.search(r"started anew( in \d+ s)?, which may happen 0 more times", errors)
    assert "no answer within 30 s from engine-0" in errors and "Traceback" not in errors
    rows = run.rows()
    for ours, theirs in zip(rows[1:], undisturbed[1:], strict=False):
        for key in ("reward/mean", "loss/total", "grad_norm", "rollout/tokens"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-6), (ours["step"], key)


@pytest.mark.slow
def test_weights_that_a_learner_lost_are_gone_on_from(pbsd):
    """A rank is killed between checkpoints. The next run has the weights that the engines had, bit for bit, and takes
    up the trajectories that they had made with them; or, if these are damaged, begins from the checkpoint."""
    options = (*SMALL, "--checkpoint.every", "3")
    run = pbsd("lost", *options, "--steps", "1000")
    run.wait_for_step(4)
    _, finished = wait_for_rollout_after(run, lambda: max(row["step"] for row in run.rows()))
    run.component("learner-1").kill()
    code, errors = run.finish()
    assert code == 1 and "learner-1 died" in errors and "Traceback" not in errors
    done = max(row["step"] for row in run.rows())
    saved = done // 3 * 3
    assert done % 3, "killed right after a checkpoint: nothing to recover"
    assert f"the weights of step {done}, " in errors and f"with the optimizer state of step_{saved}" in errors

    recovered = load_file(run.folder / "checkpoints" / "recovered" / "model.safetensors")
    held = Published(done, {name: checksum(tensor) for name, tensor in sorted(recovered.items())})
    origin = json.loads((run.folder / "trajectories" / f"step_{done + 1:06d}.unscored.origin").read_text())
    assert origin["weights"] == held.digest

    spoilt = shutil.copytree(run.folder, run.folder.with_name("spoilt"))
    weights = spoilt / "checkpoints" / "recovered" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    code, errors = pbsd("spoilt", *options, "--steps", str(done + 2), "--resume").finish()
    assert code == 1 and f"Go on without them with --resume step_{saved}" in errors
    assert re.search(r"recovered/model.safetensors is damaged: .* in model\.\S+\.weight\.", errors)
    rows = pbsd("spoilt", *options, "--steps", str(saved + 1), "--resume", f"step_{saved}").succeed()
    assert [row["step"] for row in rows] == list(range(saved + 2))

    resumed = pbsd("lost", *options, "--steps", str(done + 2), "--resume")
    code, errors = resumed.finish()
    assert code == 0, errors
    assert f"recovered weights of step {done} from the engines; optimizer state of step {saved}" in errors
    rows = resumed.rows()
    assert [row["step"] for row in rows] == list(range(done + 3))
    first = rows[done + 1]
    assert (first["recovered/weights_step"], first["recovered/optimizer_step"]) == (done, saved)
    assert first["rollout/taken_up"] >= finished > 0
    assert not [row for row in rows if "recovered/weights_step" in row and row is not first]
    assert f"weights of step {done} recovered" in (run.folder / "report.html").read_text()
    assert not (run.folder / "checkpoints" / "recovered").exists()


@pytest.mark.slow
def test_a_killed_driver_leaves_nothing_behind_and_resumes_to_the_same_losses(pbsd):
    """SIGKILL in a rollout after a checkpoint; the resumed run repeats what an uninterrupted one does, and does not
    generate again what had been finished."""
    options = (*SMALL, "--steps", "5", "--checkpoint.every", "1")
    whole = pbsd("whole", *options).succeed()
    run = pbsd("killed", *options)
    run.wait_for_step(1)
    step, finished = wait_for_rollout_after(run, lambda: newest_checkpoint(run))
    family = run.family()
    run.process.kill()
    run.process.communicate()
    assert none_left(family)
    resumed = pbsd("killed", *options, "--resume").succeed()
    assert resumed[step]["rollout/taken_up"] >= finished > 0
    assert not any(row["rollout/taken_up"] for row in (*whole[1:], *resumed[1:step], *resumed[step + 1 :]))
    assert [row["step"] for row in resumed] == [row["step"] for row in whole]
    for ours, theirs in zip(resumed[1:], whole[1:], strict=True):
        for key in ("reward/mean", "loss/total", "grad_norm", "lr", "credit/evidence_per_token", "rollout/tokens"):
            # Bit for bit where a matrix product's bits do not depend on the batch; to rounding elsewhere.
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-6), (ours["step"], key)


def newest_checkpoint(run):
    latest = run.folder / "checkpoints" / "latest"
    return int(latest.read_text().removeprefix("step_")) if latest.exists() else -1


def wait_for_rollout_after(run, done, finished=1):
    """(step, trajectories that it has finished, at least `finished`) of a rollout with the weights of step `done()`."""
    while run.process.poll() is None:
        step = done() + 1
        unscored = run.folder / "trajectories" / f"step_{step:06d}.unscored.jsonl"
        try:
            if (count := unscored.read_text().count("\n")) >= finished:
                return step, count
        except FileNotFoundError:
            time.sleep(0.02)
    raise AssertionError(run.process.communicate()[1])


@pytest.mark.parametrize(("sent", "code"), [
    (signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)])
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


@pytest.mark.slow
def test_a_corrupt_checkpoint_is_named_with_the_one_to_go_on_from(pbsd):
    options = (*SMALL, *INLINE, "--checkpoint.every", "1")
    run = pbsd("corrupt", *options, "--steps", "2")
    run.succeed()
    damaged = max((run.folder / "checkpoints" / "step_2").rglob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    code, errors = pbsd("corrupt", *options, "--steps", "3", "--resume").finish()
    assert code == 1
    assert damaged.name in errors and "Traceback" not in errors
    assert re.search(r", in \S+\. The next older checkpoint is good: go on from it with --resume step_1\n", errors)
    code, errors = pbsd("corrupt", *options, "--steps", "3", "--resume", "step_1", "--seed", "2").finish()
    assert code == 2 and "seed = 2, the checkpoint was made with 1" in errors
    rows = pbsd("corrupt", *options, "--steps", "3", "--resume", "step_1").succeed()
    assert [row["step"] for row in rows] == [0, 1, 2, 3]


def test_a_full_disk_at_checkpoint_time_is_said(pbsd, tmp_path_factory):
    """More is asked for than the disk has: the run ends before it writes, and keeps its trajectories."""
    disk = tmp_path_factory.mktemp("disk").resolve()
    with small_disk(disk, "6m"):
        run = pbsd("full", *SMALL, *INLINE, "--steps", "1", "--runs", str(disk))
        code, errors = run.finish()
        assert code == 1
        assert "checkpoint" in errors and "free" in errors and "Traceback" not in errors
        assert (disk / "full" / "trajectories" / "step_000001.jsonl").exists()
        assert not list((disk / "full" / "checkpoints").glob("step_*"))


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

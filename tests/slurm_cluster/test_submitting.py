"""Runs as jobs of a real Slurm: what is refused, what a run leaves, and how it ends."""

from __future__ import annotations

import json

import pytest
from slurm_cluster.submitted import INLINE, QUICKSTART, TINY, Alone, assert_same, pbsd

pytestmark = pytest.mark.slurm


def test_what_the_cluster_cannot_give_is_refused_before_anything_is_written(cluster):
    runs = cluster.shared / "refused"
    asked = ("submit", QUICKSTART, "--runs", str(runs))
    for overrides, parts in (
            (("--cluster.slurm.partition", "mian"), ("'mian' does not exist", "did you mean 'main'?")),
            (("--cluster.slurm.gres", "gpu:a100", "--cluster.gpus_per_node", "8", "--cluster.slurm.time_limit", "3-0"),
             ("did you mean 'gpu:h100'?", "at most '1-00:00:00'")),
            (("--cluster.slurm.extra", "[--constraint=liquid]"), ("Slurm refuses", "Invalid feature"))):
        done = pbsd(cluster, *asked, *overrides, check=False)
        assert done.returncode == 2 and all(part in done.stderr for part in parts), done.stderr
    printed = pbsd(cluster, *asked, "--dry-run").stdout
    assert printed.startswith("#!/bin/bash\n") and "srun" in printed
    assert not runs.exists()


def test_seeds_are_runs_of_an_array_with_records_of_their_own(cluster):
    runs = cluster.shared / "runs"
    pbsd(cluster, "submit", QUICKSTART, "--runs", str(runs), "--name", "curve", *TINY, *INLINE, "--steps", "3",
         "--cluster.slurm.exclusive", "false", "--seeds", "1-2", "--wait")
    rewards = []
    for seed in (1, 2):
        folder = runs / f"curve_seed{seed}"
        status = json.loads(pbsd(cluster, "status", str(folder), "--json").stdout)
        assert (status["state"], status["step"], status["reason"]) == ("complete", 3, "complete at step 3")
        job = json.loads((folder / "slurm" / "job.json").read_text())
        assert job["job"].endswith(f"_{seed}") and len(job["git"]["commit"]) == 40
        assert (folder / "slurm" / "job.sh").read_text().startswith("#!/bin/bash")
        rewards.append([json.loads(line)["rollout/tokens"] for line in (folder / "metrics.jsonl").open()
                        if json.loads(line)["step"]])
    assert rewards[0] != rewards[1]
    logs = pbsd(cluster, "logs", str(runs / "curve_seed1"), "--attempt", "1", "--follow").stdout
    assert "step 3/3" in logs
    done = pbsd(cluster, "logs", str(runs / "curve_seed1"), "--attempt", "4", check=False)
    assert done.returncode == 2 and "the nearest is 1" in done.stderr
    done = pbsd(cluster, "attach", str(runs / "curve_seed1"), check=False)
    assert done.returncode == 2 and "does not run" in done.stderr


def test_a_crash_loop_ends_with_its_common_error(cluster, submit):
    """Where checkpoints should go is a file: every attempt fails alike, the third is the last. The first one's node is
    excluded meanwhile: the others have another one, both in one allocation."""
    folder = cluster.shared / "runs" / "loop"
    folder.mkdir(parents=True)
    (folder / "checkpoints").write_text("")
    (folder / "excluded_nodes").write_text("node1\n")
    run = submit("loop", *INLINE, "--steps", "3")
    with run.attended():
        run.until(lambda: run.newest().get("nodes"), "it runs")
        (folder / "excluded_nodes").write_text("\n".join(["node1", *run.newest()["nodes"]]) + "\n")
        run.until(lambda: run.status()["state"] == "ended", "it is given up")
    status, nodes = run.status(), [attempt["nodes"][0] for attempt in run.attempts()]
    assert len(nodes) == 3 and "node1" not in nodes and nodes[0] != nodes[1] == nodes[2]
    assert "3 attempts in a row" in status["reason"] and "FileExistsError" in status["reason"]
    assert cluster.run("scontrol", "show", "job", status["job"]).stdout.count("Restarts=1") == 1


def test_a_run_goes_on_after_its_time_limit(cluster, submit):
    run = submit("limit", *INLINE, "--steps", "1000", "--cluster.slurm.time_limit", "2:00",
                 "--cluster.slurm.stop_before_s", "60")
    with run.attended():
        run.until(lambda: run.newest().get("number", 0) >= 2, "it is requeued")
        run.recovered(1)
    first = run.status()["attempts"][0]
    assert (first["exit_code"], first["asked"]) == (75, "time limit") and first["step"] > 0
    assert "with a checkpoint before its time limit" in first["outcome"]
    steps = [row["step"] for row in run.rows()]
    assert steps == list(range(len(steps))) and len(steps) > first["step"]


def test_a_run_makes_way_is_cancelled_and_goes_on(cluster, submit):
    """With the same steps as one that was left alone."""
    asked = ("submit", QUICKSTART, "--runs", str(cluster.shared / "runs"), "--name", "spot")
    with Alone(cluster, "alone", *INLINE, "--steps", "60") as alone:
        run = submit("spot", *INLINE, "--steps", "60", "--cluster.slurm.partition", "spot")
        run.until_step(4)
        taken = pbsd(cluster, *asked, check=False)
        assert taken.returncode == 2 and "is being run by job" in taken.stderr
        cluster.run("sbatch", "-w", run.newest()["nodes"][0], "--exclusive", "--wrap", "sleep 1")
        with run.attended():
            run.until(lambda: run.newest()["number"] == 2 and run.step() > run.attempts()[0]["step"] + 1, "it goes on")
        assert run.attempts()[0]["asked"] == "preemption" and run.attempts()[0]["exit_code"] == 75
        pbsd(cluster, "cancel", str(run.folder))
        run.until(lambda: run.status()["state"] == "ended", "it is cancelled")
        assert "cancelled at step" in run.status()["reason"]
        run.resubmit("--wait")
        assert run.status()["state"] == "complete"
        assert ["cancelled" in attempt["outcome"] for attempt in run.status()["attempts"]] == [False, True, False]
        assert_same(run.rows(), alone.rows())

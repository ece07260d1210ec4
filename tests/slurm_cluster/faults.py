"""Faults, one after the other, in a run that goes on on two nodes, and how long it takes to get over each.

    PYTHONPATH=.:tests python tests/slurm_cluster/faults.py

measures them, for docs/reliability.md: as root, on a machine with what tools/install_slurm.sh installs. Prints a line
of JSON for each.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

from slurm_cluster.mini_cluster import SLURMD_TIMEOUT_S, MiniCluster
from slurm_cluster.submitted import TWO_NODES, Submitted

from megatron_pbsd.config import SlurmConfig
from megatron_pbsd.config.cluster import seconds_of

STEPS = 200
SHORT_CUT_S, LONG_CUT_S = 8.0, 60.0


@dataclass(frozen=True)
class Measured:
    """seconds: from the fault to the end of the first step that had not been done before. how: what the attempt that
    it hit is said to have ended of; '' when it went on."""

    fault: str
    seconds: float
    how: str


def kill_driver(run: Submitted, head: str, other: str) -> None:
    run.cluster.run("pkill", "-9", "-f", "launcher.cli train", on=head)


def kill_slurmd(run: Submitted, head: str, other: str) -> None:
    """On the first node, where the driver goes on as an orphan."""
    run.cluster.stop_slurmd(head)


def crash_worker(run: Submitted, head: str, other: str) -> None:
    run.cluster.crash(other)


def crash_head(run: Submitted, head: str, other: str) -> None:
    run.cluster.crash(head)


def cut_worker(run: Submitted, head: str, other: str) -> None:
    run.cluster.cut(other)


def near_time_limit(run: Submitted, head: str, other: str) -> None:
    """The limit is brought so near that Slurm says so at once, and is as far away as before from then on."""
    attempt = run.newest()
    limited = ("scontrol", "update", f"JobId={attempt['job']}")
    limit, elapsed = run.cluster.run("squeue", "-h", "-j", attempt["job"], "-o", "%l %M").stdout.split()
    minutes = (seconds_of(elapsed) + SlurmConfig().stop_before_s) // 60
    run.cluster.run(*limited, f"TimeLimit={minutes}")
    run.until(lambda: run.attempts()[attempt["number"] - 1]["asked"], "Slurm says that the time limit is near")
    run.cluster.run(*limited, f"TimeLimit={limit}")


def preempt(run: Submitted, head: str, other: str) -> None:
    run.cluster.run("sbatch", "-p", "main", "-w", head, "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1")


def cancel(run: Submitted, head: str, other: str) -> None:
    """By Slurm's own command; somebody submits the run again as soon as it has ended."""
    run.cluster.run("scancel", run.newest()["job"])
    run.until(lambda: run.status()["state"] == "ended", "it is cancelled")
    run.resubmit()


def boot(run: Submitted, head: str, other: str) -> None:
    for name in (head, other):
        if not run.cluster.is_up(name):
            run.cluster.boot(name)


def start_slurmd(run: Submitted, head: str, other: str) -> None:
    run.cluster.start_slurmd(head)


def heal(run: Submitted, head: str, other: str) -> None:
    run.cluster.heal(other)


Act = Callable[[Submitted, str, str], None]
FAULTS: dict[str, tuple[Act, Act | None]] = {
    "the driver is killed": (kill_driver, None),
    "its time limit comes near": (near_time_limit, None),
    "a job of higher priority takes its node": (preempt, None),
    "the worker node crashes": (crash_worker, boot),
    "the head node crashes": (crash_head, boot),
    "slurmd dies on the head node": (kill_slurmd, start_slurmd),
    f"a cut of {LONG_CUT_S:g} s": (cut_worker, heal),
    "it is cancelled, and submitted again": (cancel, None),
}
"""Those that end an attempt: what is done, and what repairs it. The last one ends the run, and with it who waits."""


def short_cut(run: Submitted) -> Measured:
    """The run only waits."""
    attempt, began = run.newest(), time.monotonic()
    run.cluster.cut(attempt["nodes"][1])
    time.sleep(SHORT_CUT_S)
    run.cluster.heal(attempt["nodes"][1])
    step = run.step()
    run.until(lambda: run.step() > step + 1, "a new step after a short cut")
    assert run.newest()["number"] == attempt["number"], run.attempts()
    return Measured(f"a cut of {SHORT_CUT_S:g} s", round(time.monotonic() - began, 1), "")


def survive(run: Submitted, fault: str) -> Measured:
    """Do it to the newest attempt, wait for the next one's first new step, and repair what was broken."""
    injure, repair = FAULTS[fault]
    attempt, began = run.newest(), time.monotonic()
    head, other = attempt["nodes"]
    injure(run, head, other)
    seconds = run.recovered(attempt["number"]) - began
    if repair is not None:
        time.sleep(max(0.0, LONG_CUT_S - (time.monotonic() - began)) if repair is heal else 0.0)
        repair(run, head, other)
        run.until(lambda: {head, other} <= run.cluster.usable(), f"{head} and {other} can be used again")
    ended = next(one for one in run.status()["attempts"] if one["number"] == attempt["number"])
    return Measured(fault, round(seconds, 1), ended["outcome"])


def survive_all(cluster: MiniCluster, name: str, steps: int = STEPS) -> Iterator[Measured]:
    """What each fault took, one after the other, in a run that is complete in the end."""
    run = Submitted.submit(cluster, name, *TWO_NODES, "--steps", str(steps), "--cluster.slurm.partition", "spot")
    with run.attended():
        run.until_step(3)
        yield short_cut(run)
        for fault in FAULTS:
            yield survive(run, fault)
        run.until(lambda: run.newest()["exit_code"] == 0, "the run is complete")


def main() -> None:
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TORCH_COMPILE_DISABLE": "1"}
    with MiniCluster(nodes=5) as cluster:
        for measured in survive_all(cluster, "faults"):
            print(json.dumps(asdict(measured) | {"slurmd_timeout_s": SLURMD_TIMEOUT_S, "cores": os.cpu_count()}),
                  flush=True)


if __name__ == "__main__":
    main()

"""Slurm's own commands, with deadlines, and errors that say what to do."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence

from megatron_pbsd.errors import PbsdError, UsageError

DEADLINE_S = 60.0
SOON_S = 3
UNKNOWN_JOB = ("Invalid job id", "not found")


class SlurmError(PbsdError):
    """A command of Slurm failed, or gave no answer in time."""

    component = "slurm"


def is_there() -> bool:
    return shutil.which("sbatch") is not None


def require(config: str) -> None:
    """UsageError, with what to do instead, when Slurm is not on this machine."""
    if not is_there():
        raise UsageError(
            f"there is no Slurm here (no sbatch in PATH). Submit from a login node of the cluster, or run it without: "
            f"pbsd train {config} on this machine, or pbsd train {config} --ray-address HOST:PORT on a Ray cluster")


def ask(*command: str, deadline_s: float = DEADLINE_S) -> str:
    """What the command prints. SlurmError when it fails, cannot be found or takes longer than `deadline_s`."""
    done = attempt(*command, deadline_s=deadline_s)
    if done.returncode:
        said = (done.stderr or done.stdout).strip() or f"exit code {done.returncode}"
        raise SlurmError(f"{' '.join(command)} failed: {said}")
    return done.stdout


def attempt(*command: str, deadline_s: float = DEADLINE_S, text: str = "") -> subprocess.CompletedProcess[str]:
    """The same, whatever its exit code. text: what it reads."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=deadline_s, input=text)
    except FileNotFoundError as error:
        raise SlurmError(f"{command[0]} is not installed on this machine: use a login node of the cluster") from error
    except subprocess.TimeoutExpired as error:
        raise SlurmError(f"{' '.join(command)} gave no answer in {deadline_s:g} s: slurmctld is overloaded or down; "
                         "`scontrol ping` tells, then try again") from error


def partitions() -> list[dict[str, str]]:
    """One per partition and kind of node: name, up, time_limit, default_time, nodes, gres, default."""
    # %R has the name without the star that marks the default one, %P with it.
    keys = ("name", "up", "time_limit", "nodes", "gres", "shown")
    rows = [line.split("|") for line in ask("sinfo", "-h", "-o", "%R|%a|%l|%D|%G|%P").splitlines() if line.strip()]
    return [dict(zip(keys, row, strict=True)) for row in rows]


def job(number: str) -> dict[str, str]:
    """Slurm's record of a job, by its own keys (JobState, StartTime, NodeList …); empty when it has forgotten it."""
    done = attempt("scontrol", "show", "job", "-o", number)
    if done.returncode:
        if any(phrase in done.stderr + done.stdout for phrase in UNKNOWN_JOB):
            return _from_accounting(number)
        raise SlurmError(f"scontrol show job {number} failed: {(done.stderr or done.stdout).strip()}")
    return fields(done.stdout)


def fields(line: str) -> dict[str, str]:
    """`A=1 B=2 …` of one job, as scontrol prints with -o. Of an array only the first line is read."""
    pairs = (word.split("=", 1) for word in line.partition("\n")[0].split() if "=" in word)
    return {key: value for key, value in pairs}


def _from_accounting(number: str) -> dict[str, str]:
    if shutil.which("sacct") is None:
        return {}
    done = attempt("sacct", "-X", "-n", "-P", "-j", number, "-o", "State,ExitCode,NodeList,Start,End")
    return accounted(done.stdout) if not done.returncode else {}


def accounted(text: str) -> dict[str, str]:
    """sacct's line of a job in the words of scontrol; empty when there is none."""
    lines = text.strip().splitlines()
    keys = ("JobState", "ExitCode", "NodeList", "StartTime", "EndTime")
    return dict(zip(keys, lines[-1].split("|"), strict=True)) if lines else {}


def hostnames(nodes: str) -> tuple[str, ...]:
    """'node[1-3]' → node1, node2, node3."""
    return tuple(ask("scontrol", "show", "hostnames", nodes).split()) if nodes not in ("", "(null)") else ()


def down(nodes: Sequence[str]) -> tuple[str, ...]:
    """Those of the nodes that Slurm cannot use now: down, failing or not answering."""
    if not nodes:
        return ()
    # A star after the state: the node does not answer.
    rows = [line.split() for line in ask("sinfo", "-h", "-N", "-n", ",".join(nodes), "-o", "%N %T").splitlines()]
    bad = {name for name, state in rows if state.endswith("*") or state.startswith(("down", "fail", "unk"))}
    return tuple(name for name in nodes if name in bad)


def submit(script: str, test: bool = False) -> str:
    """Hand a script's text to sbatch: the job's number. `test`: only ask whether and when it could start; in Slurm's
    words. UsageError when Slurm refuses."""
    done = attempt("sbatch", "--test-only" if test else "--parsable", text=script)
    if done.returncode:
        raise UsageError(f"Slurm refuses the job: {(done.stderr or done.stdout).strip()}. `pbsd submit CONFIG "
                         "--dry-run` shows what it is asked for")
    return done.stderr.strip().removeprefix("sbatch: ") if test else done.stdout.strip().partition(";")[0]


def requeue(number: str) -> None:
    """Or leave it to Slurm, if that has done so already."""
    done = attempt("scontrol", "requeue", number)
    if done.returncode and "pending execution" not in done.stderr:
        raise SlurmError(f"scontrol requeue {number} failed: {done.stderr.strip()}")


def start_soon(number: str) -> None:
    """Slurm lets a requeued job wait for two minutes; a job that waits for nothing else starts in `SOON_S`.

    Not at once: until the second is over in which a node has ended a job, it takes no order to begin it again, and
    Slurm then ends the job for good ('Job credential revoked').
    """
    ask("scontrol", "update", f"JobId={number}", f"StartTime=now+{SOON_S}")


def exclude(number: str, nodes: Sequence[str]) -> None:
    ask("scontrol", "update", f"JobId={number}", f"ExcNodeList={','.join(nodes)}")


def cancel(number: str) -> None:
    ask("scancel", number)


def shell(number: str, node: str | None) -> None:
    """Replaces this process by an interactive shell inside a job."""
    place = ["--nodelist", node] if node else []
    os.execvp("srun", ["srun", f"--jobid={number}", "--overlap", "--nodes=1", "--ntasks=1", *place, "--pty",
                       os.environ.get("SHELL", "/bin/bash")])


def own_number() -> str:
    """The job that this process is part of; '' outside of one. '12_3' in an array."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID", "")



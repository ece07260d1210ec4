"""The machines that a run is submitted to, and how Slurm is asked for them (docs/slurm.md)."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, Field

from megatron_pbsd.config.section import PositiveInt, Section

OWN_OPTIONS = {
    "partition": "partition", "account": "account", "qos": "qos", "time": "time_limit", "signal": "stop_before_s",
    "requeue": "requeue", "no-requeue": "requeue", "exclude": "exclude", "gres": "gres", "container-image":
    "container.image", "container-mounts": "container.mounts", "exclusive": "exclusive",
}
"""Options of sbatch → the key of `SlurmConfig` that sets them."""
FIXED_OPTIONS = ("nodes", "ntasks", "ntasks-per-node", "mem", "job-name", "output", "error", "open-mode", "array",
                 "chdir")
"""Options of sbatch that follow from the run itself."""


def seconds_of(limit: str) -> int:
    """A time limit in Slurm's notation: minutes, min:s, h:min:s, days-h, days-h:min or days-h:min:s. ValueError."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", limit)
    if not found:
        raise ValueError(f"{limit!r} is no time limit: expected one such as '90' (minutes), '24:00:00' or '1-12:00:00'")
    days, first, second, third = (None if part is None else int(part) for part in found.groups())
    if days is not None:
        return ((days * 24 + first) * 60 + (second or 0)) * 60 + (third or 0)
    if second is None:
        return first * 60
    return (first * 60 + second) * 60 + third if third is not None else first * 60 + second


def _is_limit(limit: str) -> str:
    if limit and seconds_of(limit) < 60:
        raise ValueError(f"time_limit = {limit!r} is under Slurm's shortest, a minute; the nearest valid value is '1'")
    return limit


def _is_free(options: tuple[str, ...]) -> tuple[str, ...]:
    for option in options:
        if not option.startswith("--"):
            raise ValueError(f"{option!r} is no long option of sbatch; expected one such as '--reservation=tests'")
        name = option[2:].partition("=")[0]
        if name in OWN_OPTIONS:
            raise ValueError(f"{option!r} is set by cluster.slurm.{OWN_OPTIONS[name]}")
        if name in FIXED_OPTIONS:
            raise ValueError(f"{option!r} follows from the run itself (cluster.nodes, name, runs) and cannot be set")
    return options


class ContainerConfig(Section):
    image: str = ""
    """Image that the run's processes are started in (pyxis: `--container-image`); '' uses no container."""
    mounts: tuple[str, ...] = ()
    """What the container sees of the nodes: 'FROM:TO' or 'FROM:TO:ro'. The working folder and the runs have to be
    among them, at the same paths."""
    workdir: str = ""
    """Working folder in the container; '' is the one that the job was submitted from."""


class SlurmConfig(Section):
    partition: str = ""
    """Partition; '' is the cluster's default one."""
    account: str = ""
    """Account that is charged; '' is the user's default one."""
    qos: str = ""
    """Quality of service; '' is the account's default one."""
    time_limit: Annotated[str, AfterValidator(_is_limit)] = ""
    """Time limit of an attempt, such as '24:00:00' or '1-12:00:00'; '' is the partition's default. A run that needs
    longer goes on in the next attempt."""
    gres: Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+(:[A-Za-z0-9_.-]+)?$")] = "gpu"
    """Name of GPUs among the cluster's generic resources, with their type if several are there: 'gpu:h100'."""
    exclusive: bool = True
    """Whole nodes, with all of their memory."""
    container: ContainerConfig = ContainerConfig()
    """Container of the run's processes."""
    setup: tuple[str, ...] = ()
    """Lines of shell that every attempt begins with: modules to load, variables to export."""
    command: str = ""
    """How `pbsd` is called on the nodes; '' is as it was called to submit."""
    exclude: tuple[str, ...] = ()
    """Nodes that are not to be used, besides those that `pbsd preflight` has excluded."""
    preflight: bool = False
    """Every attempt begins with `pbsd preflight`. Nodes that it blames for an error are left out of the next one."""
    extra: Annotated[tuple[str, ...], AfterValidator(_is_free)] = ()
    """Further options of sbatch, such as '--reservation=maintenance'."""
    requeue: bool = True
    """An attempt that ends before the run is complete is followed by another one: after its time limit, preemption, a
    node's failure and any other failure."""
    stop_before_s: PositiveInt = 300
    """Seconds before the time limit at which the run is told to make a checkpoint after its current step, and to end.
    Longer than a step, an evaluation and a checkpoint take. Slurm may tell it up to a minute early."""
    max_identical_failures: PositiveInt = 3
    """After this many attempts in a row that failed with the same error and did no new step, there is no other one."""


class ClusterConfig(Section):
    nodes: PositiveInt = 1
    """Machines that the run is spread over."""
    gpus_per_node: Annotated[int, Field(ge=0)] = 0
    """GPUs of each; 0 runs on CPUs."""
    gpu: str = ""
    """Which GPU that is, for `pbsd plan`: such as 'h100-80g'."""
    min_nodes: PositiveInt | None = None
    """Attempts may have as few nodes as this if there are no more, with less data parallelism and fewer engines; None
    waits for all."""
    slurm: SlurmConfig = SlurmConfig()
    """How Slurm is asked for them."""

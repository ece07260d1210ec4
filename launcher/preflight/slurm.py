"""Where a process stands among the nodes of its Slurm step: SLURM_* variables. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping

from megatron_pbsd.errors import UsageError

FIRST_PORT, PORTS = 20000, 10000
"""Ports of rendezvous: below those that Linux hands out by itself, from 32768 on."""


def node_names(text: str) -> tuple[str, ...]:
    """Slurm's notation of several hosts: 'gpu[01-03,7],login1' → gpu01, gpu02, gpu03, gpu7, login1. UsageError."""
    parts = re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", text)
    names = [name for part in parts for name in _expanded(part)]
    if not names or ",".join(parts) != text or not all(re.fullmatch(r"[A-Za-z0-9._-]+", name) for name in names):
        raise UsageError(f"{text!r} is no list of hosts such as 'node[1-3,7],login1'")
    return tuple(names)


def _expanded(pattern: str) -> list[str]:
    found = re.fullmatch(r"([^\[]*)\[([0-9,-]+)\](.*)", pattern)
    if not found:
        return [pattern]
    before, numbers, after = found.groups()
    names = []
    for item in numbers.split(","):
        first, _, last = item.partition("-")
        for number in range(int(first), int(last or first) + 1):
            names += [f"{before}{number:0{len(first)}}{rest}" for rest in _expanded(after)]
    return names


def step(environment: Mapping[str, str]) -> tuple[int, tuple[str, ...]] | None:
    """(this node's number, names of all nodes of the step); None outside of one with several nodes. A job's script runs
    in no step, though it sees the job's variables."""
    if "SLURM_STEP_NODELIST" not in environment or environment.get("SLURM_STEP_ID", "").startswith("429496"):
        return None
    names = node_names(environment["SLURM_STEP_NODELIST"])
    rank = int(environment.get("SLURM_NODEID", 0))
    if rank >= len(names):
        raise UsageError(f"SLURM_NODEID = {rank} is none of the step's nodes {', '.join(names)}")
    if environment.get("SLURM_LOCALID", "0") != "0":
        raise UsageError(f"SLURM_LOCALID = {environment['SLURM_LOCALID']}: this node has a process that looks at it "
                         "already; use srun --ntasks-per-node=1")
    return (rank, names) if len(names) > 1 else None


def rendezvous_port(environment: Mapping[str, str]) -> int:
    """The same on all nodes of a step, and another one for others."""
    job, attempt = (int(environment.get(name, 0)) for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"))
    return FIRST_PORT + (job * 7 + attempt + int(environment.get("SLURM_STEP_ID", 0))) % PORTS

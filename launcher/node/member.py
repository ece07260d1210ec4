"""Which of a run's machines this one is: from Slurm, or as the command line says."""

from __future__ import annotations

import re
import socket
import zlib
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass

from megatron_pbsd.errors import UsageError

FOREIGN = ("SLURM_", "SLURMD_", "SRUN_", "PMI_", "PMIX_", "OMPI_", "MPI_", "PRTE_")
"""Variables by which a library would take its process for a task of MPI or of Slurm, and join or wait for others."""
FIRST_PORT, PORTS, BLOCKS = 7000, 8, 370
"""Below what Ray gives its workers (10002 to 19999), which is below what Linux gives to whoever asks for any."""


@dataclass(frozen=True)
class Member:
    """One of `count` machines; rank 0 is the head. hosts: names of all in the order of ranks, where they are known.

    job: what tells this meeting from others in the same folder; '' without Slurm.
    """

    rank: int
    count: int
    hosts: tuple[str, ...] = ()
    job: str = ""

    def name_of(self, rank: int) -> str:
        return self.hosts[rank] if rank < len(self.hosts) else f"node rank {rank}"


def member_of(
    environ: Mapping[str, str], nodes: int | None, rank: int | None, head: str | None,
    hostnames: Callable[[str], tuple[str, ...]]
) -> Member:
    """nodes, rank, head: from the command line, None for what Slurm says. hostnames: 'node[1-3]' → its names.

    UsageError when neither says it, or they cannot be.
    """
    if nodes is None and rank is None:
        if "SLURM_PROCID" not in environ:
            return Member(0, 1)
        count = int(environ.get("SLURM_STEP_NUM_NODES", environ.get("SLURM_NNODES", "1")))
        if (tasks := int(environ.get("SLURM_NTASKS", count))) != count:
            raise UsageError(f"`pbsd node` is to be started once on each node, but this step has {tasks} tasks on "
                             f"{count} nodes: give srun --ntasks-per-node=1")
        job = f"{environ.get('SLURM_JOB_ID', '')}.{environ.get('SLURM_RESTART_COUNT', '0')}"
        listed = environ.get("SLURM_STEP_NODELIST", environ.get("SLURM_JOB_NODELIST", ""))
        return Member(int(environ["SLURM_NODEID"]), count, hostnames(listed), job)
    nodes = 1 if nodes is None else nodes
    if rank is None and nodes == 1:
        rank = 0
    if rank is None or not 0 <= rank < nodes:
        raise UsageError(f"--node-rank {rank}: with --nodes {nodes} it has to be from 0 to {nodes - 1}")
    return Member(rank, nodes, (head,) if head else ())


def without_foreign(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment for Ray and the driver."""
    return {name: value for name, value in environ.items() if not name.startswith(FOREIGN)}


def port_block(job: str, rank: int, is_free: Callable[[int], bool]) -> range:
    """Ports for one machine's servers: where a job's begin follows from its number, unless others are there.

    UsageError when no block is free.
    """
    first = zlib.crc32(job.encode()) + rank
    for number in range(first, first + BLOCKS):
        start = FIRST_PORT + number % BLOCKS * PORTS
        block = range(start, start + PORTS)
        if all(map(is_free, block)):
            return block
    raise UsageError(f"no {PORTS} TCP ports in a row are free from {FIRST_PORT} to {FIRST_PORT + BLOCKS * PORTS - 1}")


def own_address(towards: str, port: int = 9) -> str:
    """This machine's address on the way to another host, to which nothing is sent. OSError when there is no way."""
    with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as probe:
        probe.connect((towards, port))
        return probe.getsockname()[0]


def head_address(member: Member) -> str:
    """Of this machine, as the others reach it: on the way to the next one, or else what its name stands for. UsageError
    when that is this machine's loopback, which the others cannot mean."""
    if len(member.hosts) > 1:
        return own_address(member.hosts[1])
    name = member.hosts[0] if member.hosts else socket.gethostname()
    try:
        found = socket.gethostbyname(name)
    except OSError as error:
        raise UsageError(f"the head's address is not known: {name!r} does not resolve ({error.strerror}); say it with "
                         "--head ADDRESS") from error
    if not member.hosts and re.match(r"127\.", found):
        raise UsageError(f"the head's address is not known: {name!r} stands for {found}, which is every machine's own; "
                         "say it with --head ADDRESS")
    return found

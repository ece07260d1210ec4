"""What a rule finds, and what it compares with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

from launcher.preflight.facts import Observed

Check = Literal[
    "nodes", "one node per machine", "probes", "versions",
    "GPU count", "GPU model", "ECC", "GPU repair", "throttling", "GPU clocks", "GPU power", "GPU memory",
    "foreign processes", "PCIe", "NVLink",
    "fabric ports", "network", "link", "host name", "network variables",
    "shared folder", "clocks", "connections", "bandwidth", "slow path", "all-reduce", "NCCL on fabric",
    "ports", "/dev/shm", "open files", "locked memory", "disk space", "disk speed", "import time"]
CHECKS: tuple[str, ...] = get_args(Check)
"""docs/preflight.md has a row for each."""
Value = TypeVar("Value", bound=Hashable)


@dataclass(frozen=True)
class Finding:
    """rank: the node, None for all together. measured, expected: as a person reads them. blames_node: another node in
    its place would do; the job may leave it out."""

    severity: Literal["error", "warning"]
    check: Check
    rank: int | None
    what: str
    measured: str
    expected: str
    remedy: str
    blames_node: bool = False


@dataclass(frozen=True)
class Expected:
    """What the run needs of each node. gpus: how many, None for as many as most others have. gpu: such as 'h100-80g',
    '' for any. shm_bytes: of shared memory. run_bytes, temporary_bytes: free on disks."""

    gpus: int | None = None
    gpu: str = ""
    shm_bytes: int = 1 << 30
    run_bytes: int = 20 * 10**9
    temporary_bytes: int = 10 * 10**9


Rule = Callable[[Observed, Expected], Iterator[Finding]]


def usual(values: Mapping[int, Value]) -> tuple[Value, bool]:
    """(the most frequent value, whether more than half have it). Of equally frequent ones the lowest rank's."""
    counts = Counter(values[rank] for rank in sorted(values))
    value, count = counts.most_common(1)[0]
    return value, 2 * count > len(values)


def odd_ones(values: Mapping[int, Value]) -> Iterator[tuple[int, Value, Value, bool]]:
    """(rank, its value, the usual one, whether that is the majority's) of those that differ."""
    if values:
        common, majority = usual(values)
        for rank, value in sorted(values.items()):
            if value != common:
                yield rank, value, common, majority


def size(nbytes: float) -> str:
    """In decimal units, as disks and memory of GPUs are sold."""
    for unit, amount in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if nbytes >= amount:
            return f"{nbytes / amount:.1f} {unit}"
    return f"{nbytes:.0f} bytes"

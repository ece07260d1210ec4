"""How much memory is in use, as the system counts it."""

from __future__ import annotations

import ctypes
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch


@dataclass(frozen=True)
class MemoryUse:
    """held: bytes of a component by what they are, as it counts them itself. used: bytes in use at `place`, which is a
    process with those below it, or a device, whoever uses it; None where others count them."""

    held: Mapping[str, int]
    place: str = ""
    used: int | None = None


def of_process(held: Mapping[str, int]) -> MemoryUse:
    """Memory of this process and all below it that they share with nobody: neither code nor shared memory."""
    give_back_freed()
    me = psutil.Process()
    processes = [me, *me.children(recursive=True)]
    used = sum(anonymous_bytes(process.pid) for process in processes)
    return MemoryUse(held, f"{socket.gethostname()}/{me.pid}", used)


def of_device(device: torch.device, held: Mapping[str, int]) -> MemoryUse:
    """As NVML counts: all processes together, CUDA contexts included."""
    free, total = torch.cuda.mem_get_info(device)
    return MemoryUse(held, f"{socket.gethostname()}/{torch.cuda.get_device_properties(device).uuid}", total - free)


def give_back_freed() -> None:
    """To the system, what malloc keeps of memory that has been freed. Only glibc's can be told to."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def anonymous_bytes(pid: int) -> int:
    """Resident memory without files and shared memory; 0 once the process is gone."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return 0


def total(uses: list[MemoryUse]) -> int:
    """Of all places, each counted once, whoever names it."""
    return sum({use.place: use.used for use in uses if use.used is not None}.values())


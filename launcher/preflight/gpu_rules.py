"""What is wrong with GPUs."""

from __future__ import annotations

import re
from collections.abc import Iterator

from launcher.preflight.facts import Gpu, NodeFacts, Observed
from launcher.preflight.findings import Expected, Finding, odd_ones, size, usual

FREE = 0.95
"""Share of a GPU's memory that is free when nobody uses it: a driver keeps under 1 %."""
SHIPPED = 0.98
"""Least share of its shipped power limit that a GPU may be held to without a word."""
SOLD = 0.92
"""Least share of the memory in a GPU's name that its driver shows: some is kept for ECC."""
SLOWED = {"hardware slowdown", "heat (hardware)", "power brake"}
"""Reasons of throttling that end with a repair. Those that a driver or an administrator sets are warnings."""


def count(observed: Observed, expected: Expected) -> Iterator[Finding]:
    counts = {node.rank: len(node.gpus) for node in observed.nodes if "GPUs" not in node.failures}
    if not counts:
        return
    wanted, majority = (expected.gpus, True) if expected.gpus is not None else usual(counts)
    for rank, found in sorted(counts.items()):
        if found < wanted or (expected.gpus is None and found != wanted):
            yield Finding("error", "GPU count", rank, "GPUs", str(found), str(wanted), "nvidia-smi on the node: is "
                          "one lost (XID 79 in dmesg), or did the job ask for fewer? A reset or a reboot brings a "
                          "lost one back", blames_node=majority and 2 * _short(counts, wanted) < len(counts))


def _short(counts: dict[int, int], wanted: int) -> int:
    """How many nodes have fewer: where most do, what was asked for is wrong, not the nodes."""
    return sum(found < wanted for found in counts.values())


def model(observed: Observed, expected: Expected) -> Iterator[Finding]:
    wanted = re.fullmatch(r"([a-z0-9]+?)(?:-.*?(\d+)g)?", expected.gpu.lower())
    for node in observed.nodes:
        for gpu in node.gpus if wanted else ():
            name, gigabytes = wanted.groups()
            small = gigabytes is not None and gpu.total_bytes < SOLD * int(gigabytes) * 1e9
            if name not in gpu.name.lower() or small:
                yield Finding("error", "GPU model", node.rank, _gpu(gpu), f"{gpu.name}, {size(gpu.total_bytes)}",
                              expected.gpu, "ask for these GPUs (cluster.slurm.gres), or correct cluster.gpu")
    names = {node.rank: tuple(sorted({gpu.name for gpu in node.gpus})) for node in observed.nodes if node.gpus}
    for rank, found, common, majority in odd_ones(names):
        yield Finding("error", "GPU model", rank, "other GPUs than most nodes", ", ".join(found), ", ".join(common),
                      "ask for one kind of GPU (cluster.slurm.gres)", blames_node=majority)


def ecc(observed: Observed, expected: Expected) -> Iterator[Finding]:
    for node, gpu in _all(observed):
        if gpu.volatile_ecc:
            yield Finding("error", "ECC", node.rank,
                          f"{_gpu(gpu)}: uncorrected memory errors since the driver was loaded", str(gpu.volatile_ecc),
                          "0", "reset the GPU (nvidia-smi -r); have it replaced when they come again",
                          blames_node=True)
        elif gpu.aggregate_ecc:
            yield Finding("warning", "ECC", node.rank, f"{_gpu(gpu)}: uncorrected memory errors in its life",
                          str(gpu.aggregate_ecc), "0", "watch it: nvidia-smi -q -d ECC")
        if gpu.ecc is False:
            yield Finding("warning", "ECC", node.rank, f"{_gpu(gpu)}: error correction", "off", "on",
                          "nvidia-smi -e 1 and a reset; without it, errors go unnoticed into the weights")


def repair(observed: Observed, expected: Expected) -> Iterator[Finding]:
    for node, gpu in _all(observed):
        if gpu.failed_repair:
            yield Finding("error", "GPU repair", node.rank, f"{_gpu(gpu)}: a row of its memory",
                          "could not be replaced", "none failed", "have the GPU replaced", blames_node=True)
        elif gpu.pending_repair:
            yield Finding("error", "GPU repair", node.rank, f"{_gpu(gpu)}: pages or rows of its memory",
                          "wait to be replaced", "none wait", "reset the GPU (nvidia-smi -r), or reboot",
                          blames_node=True)


def throttling(observed: Observed, expected: Expected) -> Iterator[Finding]:
    for node, gpu in _all(observed):
        if hard := [reason for reason in gpu.throttle if reason in SLOWED]:
            yield Finding("error", "throttling", node.rank, f"{_gpu(gpu)}: clocks are held down", ", ".join(hard),
                          "nothing", "cooling and power supply of the node; nvidia-smi -q -d PERFORMANCE",
                          blames_node=True)
        if soft := [reason for reason in gpu.throttle if reason not in SLOWED]:
            yield Finding("warning", "throttling", node.rank, f"{_gpu(gpu)}: clocks are held down", ", ".join(soft),
                          "nothing",
                          "nvidia-smi -rgc and -rac give clocks back; for heat and power look at the node's sensors")


def clocks(observed: Observed, expected: Expected) -> Iterator[Finding]:
    slowest = {node.rank: min(known) for node in observed.nodes
               if (known := [gpu.max_sm_mhz for gpu in node.gpus if gpu.max_sm_mhz])}
    for rank, found, common, majority in odd_ones(slowest):
        if found < common:
            yield Finding("error", "GPU clocks", rank, "the most that the GPUs' clocks may go to", f"{found} MHz",
                          f"{common} MHz", "another card or VBIOS: nvidia-smi -q; all wait for the slowest",
                          blames_node=majority)


def power(observed: Observed, expected: Expected) -> Iterator[Finding]:
    for node, gpu in _all(observed):
        limit, shipped = gpu.power_limit_w, gpu.default_power_limit_w
        if limit is not None and shipped is not None and limit < SHIPPED * shipped:
            yield Finding("warning", "GPU power", node.rank, f"{_gpu(gpu)}: power limit", f"{limit:.0f} W",
                          f"{shipped:.0f} W", f"nvidia-smi -pl {shipped:.0f}, unless the centre wants it so")
    limits = {node.rank: min(known) for node in observed.nodes
              if (known := [gpu.power_limit_w for gpu in node.gpus if gpu.power_limit_w is not None])}
    for rank, found, common, majority in odd_ones(limits):
        if found < common:
            yield Finding("error", "GPU power", rank, "a lower power limit than most nodes", f"{found:.0f} W",
                          f"{common:.0f} W", f"nvidia-smi -pl {common:.0f} on the node; all wait for the slowest",
                          blames_node=majority)


def memory(observed: Observed, expected: Expected) -> Iterator[Finding]:
    for node, gpu in _all(observed):
        if gpu.free_bytes < FREE * gpu.total_bytes and not gpu.processes:
            yield Finding("error", "GPU memory", node.rank, f"{_gpu(gpu)}: free, though no process is seen to use it",
                          size(gpu.free_bytes), f"at least {size(FREE * gpu.total_bytes)}", "a process in another "
                          "container or a dead one's leftovers: fuser -v /dev/nvidia*, then a reset", blames_node=True)


def foreign_processes(observed: Observed, expected: Expected) -> Iterator[Finding]:
    for node, gpu in _all(observed):
        for process in gpu.processes:
            who = " of ".join(part for part in (process.name or "a process", process.user) if part)
            yield Finding("error", "foreign processes", node.rank, f"{_gpu(gpu)}: {who}",
                          f"pid {process.pid}, {size(process.used_bytes)}", "no process",
                          f"left by an earlier job? kill {process.pid} on the node; otherwise ask for whole nodes "
                          "(cluster.slurm.exclusive)", blames_node=True)


def pcie(observed: Observed, expected: Expected) -> Iterator[Finding]:
    for node, gpu in _all(observed):
        if gpu.pcie_width and gpu.max_pcie_width and gpu.pcie_width < gpu.max_pcie_width:
            yield Finding("warning", "PCIe", node.rank, f"{_gpu(gpu)}: lanes", f"x{gpu.pcie_width}",
                          f"x{gpu.max_pcie_width}",
                          "the card or its riser sits badly: copies to and from the host are slow")


def nvlink(observed: Observed, expected: Expected) -> Iterator[Finding]:
    least = {node.rank: min(known) for node in observed.nodes
             if (known := [gpu.nvlinks for gpu in node.gpus if gpu.nvlinks is not None])}
    for rank, found, common, majority in odd_ones(least):
        if found < common:
            yield Finding("error", "NVLink", rank, "active links of a GPU", str(found), str(common),
                          "nvidia-smi nvlink -s; is nvidia-fabricmanager running? Otherwise a reset",
                          blames_node=majority)
    for node, gpu in _all(observed):
        most = max((one.nvlinks for one in node.gpus if one.nvlinks is not None), default=0)
        if gpu.nvlinks is not None and gpu.nvlinks < most:
            yield Finding("error", "NVLink", node.rank, f"{_gpu(gpu)}: active links", str(gpu.nvlinks),
                          f"{most}, as others", "nvidia-smi nvlink -s; a reset, or a replacement", blames_node=True)


RULES = (count, model, ecc, repair, throttling, clocks, power, memory, foreign_processes, pcie, nvlink)


def _all(observed: Observed) -> Iterator[tuple[NodeFacts, Gpu]]:
    for node in observed.nodes:
        for gpu in node.gpus:
            yield node, gpu


def _gpu(gpu: Gpu) -> str:
    return f"GPU {gpu.index}"

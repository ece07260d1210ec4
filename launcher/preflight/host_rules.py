"""What is wrong with nodes, beside GPUs and networks."""

from __future__ import annotations

from collections.abc import Iterator

from launcher.preflight.facts import Observed
from launcher.preflight.findings import Expected, Finding, odd_ones, size

CRITICAL = ("python", "torch", "CUDA", "NCCL", "megatron-core", "megatron-pbsd", "ray", "sglang", "transformers",
            "transformer-engine")
"""Versions that must be equal: the others' differences are warnings."""
OPEN_FILES, FEW_OPEN_FILES = 65536, 4096
"""What Ray's documentation asks of `ulimit -n` for clusters, and what a node of many actors does not get by with."""
LOCKED_BYTES = 16 << 30
"""Of locked memory, below which RDMA has been seen to fail to register buffers."""
SLOW_DISK_MB_S = 100.0
SLOW_IMPORT_S, SLOW_IMPORT_RATIO = 60.0, 4.0
"""Importing torch longer than this, or so many times as long as the typical node and 10 s more, stalls every start."""


def probes(observed: Observed, expected: Expected) -> Iterator[Finding]:
    for node in observed.nodes:
        for probe, failure in node.failures.items():
            yield Finding("error", "probes", node.rank, f"{probe} could not be looked at", failure, "an answer",
                          "what hangs or fails there will in the run as well: try it by hand on the node",
                          blames_node=_rare(observed, probe))


def _rare(observed: Observed, probe: str) -> bool:
    """Whether this fails on less than half of the nodes: otherwise it is not the node."""
    return 2 * sum(probe in node.failures for node in observed.nodes) < len(observed.nodes)


def versions(observed: Observed, expected: Expected) -> Iterator[Finding]:
    asked = [node for node in observed.nodes if not {"versions", "GPUs"} & node.failures.keys()]
    for name in sorted({name for node in asked for name in node.versions}):
        for rank, found, common, majority in odd_ones({n.rank: n.versions.get(name, "none") for n in asked}):
            critical = name in CRITICAL
            yield Finding("error" if critical else "warning", "versions", rank, f"another {name} than most nodes"
                          if majority else f"another {name} than other nodes", found, common,
                          "start all nodes from one environment or container image" if name not in (
                              "driver", "driver CUDA", "kernel") else "tell the administrators of the node",
                          blames_node=critical and majority)


def import_time(observed: Observed, expected: Expected) -> Iterator[Finding]:
    known = {node.rank: node.import_s for node in observed.nodes if node.import_s is not None}
    typical = sorted(known.values())[(len(known) - 1) // 2] if known else 0.0
    for rank, seconds in known.items():
        if seconds > SLOW_IMPORT_S or seconds > SLOW_IMPORT_RATIO * typical + 10:
            yield Finding("warning", "import time", rank, "importing torch", f"{seconds:.0f} s",
                          f"at most {min(SLOW_IMPORT_S, SLOW_IMPORT_RATIO * typical + 10):.0f} s",
                          "put the environment on a local disk or into a container image: every process imports it")


def ports(observed: Observed, expected: Expected) -> Iterator[Finding]:
    for node in observed.nodes:
        for port in node.busy_ports:
            yield Finding("error", "ports", node.rank, f"port {port}", "in use", "free", f"ss -tlnp 'sport = :{port}' "
                          "names who has it: an earlier job's Ray? Otherwise choose another ray_port",
                          blames_node=len(observed.nodes) > 1)


def shared_memory(observed: Observed, expected: Expected) -> Iterator[Finding]:
    for node in observed.nodes:
        if node.shm_bytes is not None and node.shm_bytes < expected.shm_bytes:
            yield Finding("error", "/dev/shm", node.rank, "size of /dev/shm", size(node.shm_bytes),
                          size(expected.shm_bytes),
                          "containers: --shm-size or --ipc=host; else: mount -o remount,size=… /dev/shm",
                          blames_node=_few_small(observed, expected))
        elif node.shm_free_bytes is not None and node.shm_free_bytes < expected.shm_bytes:
            yield Finding("error", "/dev/shm", node.rank, "free in /dev/shm", size(node.shm_free_bytes),
                          size(expected.shm_bytes), "an earlier job's leftovers: look at ls -l /dev/shm",
                          blames_node=len(observed.nodes) > 1)


def _few_small(observed: Observed, expected: Expected) -> bool:
    """Whether most nodes have enough."""
    sizes = [node.shm_bytes for node in observed.nodes if node.shm_bytes is not None]
    return 2 * sum(one < expected.shm_bytes for one in sizes) < len(sizes)


def open_files(observed: Observed, expected: Expected) -> Iterator[Finding]:
    for node in observed.nodes:
        if node.limits and node.limits.nofile[0] is not None and node.limits.nofile[0] < OPEN_FILES:
            soft, hard = node.limits.nofile
            reachable = hard is None or hard >= OPEN_FILES
            yield Finding("error" if soft < FEW_OPEN_FILES else "warning", "open files", node.rank,
                          "files that a process may have open", str(soft), f"at least {OPEN_FILES}",
                          f"ulimit -n {OPEN_FILES} among cluster.slurm.setup" if reachable else
                          f"its hard limit is {hard}: LimitNOFILE of slurmd, or /etc/security/limits.conf")


def locked_memory(observed: Observed, expected: Expected) -> Iterator[Finding]:
    for node in observed.nodes:
        soft = node.limits.memlock[0] if node.limits else None
        if node.fabric and soft is not None and soft < LOCKED_BYTES:
            yield Finding("error", "locked memory", node.rank, "memory that a process may lock, as RDMA has to",
                          size(soft), "unlimited", "ulimit -l unlimited; for Slurm LimitMEMLOCK=infinity of slurmd")


def disk_space(observed: Observed, expected: Expected) -> Iterator[Finding]:
    for node in observed.nodes:
        for disk in node.disks:
            needed = expected.run_bytes if disk.purpose == "run" else expected.temporary_bytes
            if disk.free_bytes < needed:
                yield Finding("error", "disk space", node.rank, f"free at {disk.path}, for the {disk.purpose} folder",
                              size(disk.free_bytes), f"at least {size(needed)}",
                              "keep fewer checkpoints (checkpoint.keep), or choose another folder (runs)"
                              if disk.purpose == "run" else "remove what earlier jobs left there, or set TMPDIR",
                              blames_node=disk.purpose == "temporary" and len(observed.nodes) > 1)


def disk_speed(observed: Observed, expected: Expected) -> Iterator[Finding]:
    for node in observed.nodes:
        for disk in node.disks:
            if disk.write_mb_s is None:
                yield Finding("error", "disk speed", node.rank, f"{disk.path}, for the {disk.purpose} folder",
                              "cannot be written to", "can be", "permissions, quota (quota -s), or mounted read-only?",
                              blames_node=disk.purpose == "temporary" and len(observed.nodes) > 1)
            elif disk.write_mb_s < SLOW_DISK_MB_S:
                yield Finding("warning", "disk speed", node.rank,
                              f"writing to {disk.path} ({disk.filesystem}), for the {disk.purpose} folder",
                              f"{disk.write_mb_s:.0f} MB/s", f"at least {SLOW_DISK_MB_S:.0f} MB/s",
                              "checkpoints will take long: a parallel file system, or a larger checkpoint.every")


RULES = (probes, versions, import_time, ports, shared_memory, open_files, locked_memory, disk_space, disk_speed)

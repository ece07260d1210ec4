"""What this machine is like, beside its GPUs: versions, networks, limits, disks, ports."""

from __future__ import annotations

import os
import platform
import resource
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import psutil

from launcher.preflight.facts import Disk, FabricPort, Interface, Limits
from megatron_pbsd.ports import is_free

PACKAGES = ("megatron-pbsd", "megatron-core", "ray", "sglang", "transformers", "transformer-engine", "numpy")
NETWORK_VARIABLES = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "NCCL_IB_HCA", "NCCL_IB_DISABLE", "NCCL_NET",
                     "NCCL_P2P_DISABLE", "NCCL_SHM_DISABLE")
INFINIBAND = 32
"""linux/if_arp.h: the type of an interface for IP over InfiniBand."""
WRITTEN_BYTES, WRITING_S = 64 << 20, 5.0
"""How much is written to a disk to learn how fast it is, and for how long at most."""


def versions() -> dict[str, str]:
    """Of what has to be the same on all nodes, whatever of it is installed; torch's need it imported."""
    import torch

    found = {"python": platform.python_version(), "kernel": platform.release(), "torch": torch.__version__}
    if torch.version.cuda:
        found["CUDA"] = torch.version.cuda
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def import_seconds() -> float | None:
    """In which torch is imported; None when it has been already."""
    if "torch" in sys.modules:
        return None
    began = time.perf_counter()
    import torch  # noqa: F401

    return time.perf_counter() - began


def interfaces(sys_root: Path = Path("/sys")) -> tuple[Interface, ...]:
    """All with an IPv4 address."""
    states, found = psutil.net_if_stats(), []
    for name, addresses in sorted(psutil.net_if_addrs().items()):
        folder = sys_root / "class/net" / name
        fabric = (folder / "device/infiniband").is_dir() or _text(folder / "type") == str(INFINIBAND)
        state = states.get(name)
        for one in addresses:
            if one.family == socket.AF_INET and one.netmask:
                speed = state.speed / 1000 if state and 0 < state.speed < 65535 * 100 else None
                found.append(Interface(name, one.address, one.netmask, bool(state and state.isup),
                                       state.mtu if state else 0, speed, fabric))
    return tuple(found)


def fabric_ports(sys_root: Path = Path("/sys")) -> tuple[FabricPort, ...]:
    """Ports of RDMA devices (kernel documentation, ABI/stable/sysfs-class-infiniband)."""
    found = []
    for port in sorted((sys_root / "class/infiniband").glob("*/ports/*")):
        rate = _text(port / "rate").split()  # such as '400 Gb/sec (4X NDR)'
        found.append(FabricPort(
            f"{port.parts[-3]}/{port.name}", _text(port / "state").partition(": ")[2],
            _text(port / "phys_state").partition(": ")[2], float(rate[0]) if rate else 0.0, _text(port / "link_layer")))
    return tuple(found)


def route_address(host: str, port: int) -> str:
    """This machine's address on the way to `host`. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port or 9))
        return probe.getsockname()[0]


def own_address() -> str:
    """What the host's name resolves to, or '' when nothing knows it."""
    with suppress(OSError):
        return socket.gethostbyname(socket.gethostname())
    return ""


def limits() -> Limits:
    def read(kind: int) -> tuple[int | None, int | None]:
        soft, hard = (None if value == resource.RLIM_INFINITY else value for value in resource.getrlimit(kind))
        return soft, hard

    return Limits(read(resource.RLIMIT_NOFILE), read(resource.RLIMIT_MEMLOCK))


def busy(ports: Sequence[int]) -> tuple[int, ...]:
    return tuple(port for port in ports if not is_free(port))


def shared_memory(path: str = "/dev/shm") -> tuple[int, int]:
    """(bytes, free bytes)."""
    state = os.statvfs(path)
    return state.f_blocks * state.f_frsize, state.f_bavail * state.f_frsize


def disk(purpose: str, folder: Path) -> Disk:
    """Of the folder, or the nearest one above that exists."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    return Disk(purpose, str(existing), _filesystem(existing), psutil.disk_usage(str(existing)).free,
                write_mb_s(existing))


def write_mb_s(folder: Path, nbytes: int = WRITTEN_BYTES, seconds: float = WRITING_S) -> float | None:
    """10⁶ bytes per second until they are on the disk, or the server has them; None when nothing can be written."""
    path, block = folder / f".pbsd-preflight-{socket.gethostname()}-{os.getpid()}", os.urandom(1 << 20) * 16
    try:
        with path.open("wb", buffering=0) as file:
            began, written = time.perf_counter(), 0
            while written < nbytes and time.perf_counter() - began < seconds:
                written += file.write(block)
                os.fdatasync(file.fileno())
            return written / (time.perf_counter() - began) / 1e6
    except OSError:
        return None
    finally:
        with suppress(OSError):
            path.unlink()


def network_variables() -> dict[str, str]:
    return {name: os.environ[name] for name in NETWORK_VARIABLES if name in os.environ}


def _filesystem(path: Path) -> str:
    """The type of what is mounted there, such as nfs4 or lustre."""
    mounts = sorted(psutil.disk_partitions(all=True), key=lambda mount: len(mount.mountpoint))
    return next((m.fstype for m in reversed(mounts) if path.is_relative_to(m.mountpoint)), "")


def _text(path: Path) -> str:
    """Of a file of the kernel's, '' when there is none to be read: not every device has all of them."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""

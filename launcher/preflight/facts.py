"""What a node says of itself, and what was measured between nodes. Plain data that JSON can hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter


@dataclass(frozen=True)
class GpuProcess:
    """A process that holds memory of a GPU. name, user: '' where the system does not tell."""

    pid: int
    name: str
    user: str
    used_bytes: int


@dataclass(frozen=True)
class Gpu:
    """A device as its driver describes it. None: the driver does not tell.

    ecc: whether it is on. volatile_ecc: uncorrected errors since the driver was loaded; aggregate_ecc: ever.
    pending_repair: pages or rows wait for a reset to be replaced. failed_repair: a row could not be replaced.
    throttle: reasons for which clocks are held down now, by the names of `gpus.THROTTLE`. sm_mhz: now; max_sm_mhz: at
    most. power_limit_w: enforced; default_power_limit_w: as shipped. pcie_width, nvlinks: lanes and links in use.
    """

    index: int
    name: str
    uuid: str
    total_bytes: int
    free_bytes: int
    ecc: bool | None = None
    volatile_ecc: int | None = None
    aggregate_ecc: int | None = None
    pending_repair: bool | None = None
    failed_repair: bool | None = None
    throttle: tuple[str, ...] = ()
    sm_mhz: int | None = None
    max_sm_mhz: int | None = None
    power_limit_w: float | None = None
    default_power_limit_w: float | None = None
    pcie_width: int | None = None
    max_pcie_width: int | None = None
    nvlinks: int | None = None
    processes: tuple[GpuProcess, ...] = ()


@dataclass(frozen=True)
class Interface:
    """A network interface with an IPv4 address. speed_gbit: of the link, None where the kernel does not know it.
    fabric: it stands on InfiniBand or RoCE."""

    name: str
    address: str
    netmask: str
    up: bool
    mtu: int
    speed_gbit: float | None = None
    fabric: bool = False


@dataclass(frozen=True)
class FabricPort:
    """A port of an RDMA device. name: such as 'mlx5_0/1'. state, physical: as the kernel words it: ACTIVE, LinkUp."""

    name: str
    state: str
    physical: str
    rate_gbit: float
    link_layer: str


@dataclass(frozen=True)
class Disk:
    """A folder that the run writes to. purpose: run | temporary. write_mb_s: None when it could not be written to."""

    purpose: str
    path: str
    filesystem: str
    free_bytes: int
    write_mb_s: float | None


@dataclass(frozen=True)
class Limits:
    """ulimits of this process: soft, hard; None is unlimited. memlock: bytes."""

    nofile: tuple[int | None, int | None]
    memlock: tuple[int | None, int | None]


@dataclass(frozen=True)
class NodeFacts:
    """A node. rank: among the nodes, from 0. own_address: what its host name resolves to. route_address: its address on
    the way to the rendezvous. versions: by name. import_s: seconds in which torch was imported, None when it had been
    before. busy_ports: among those that the run needs. variables: of the environment, those that choose networks.
    failures: probe → what kept it from answering; what it would have said is missing or empty here.
    """

    rank: int
    name: str
    hostname: str
    own_address: str = ""
    route_address: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    import_s: float | None = None
    gpus: tuple[Gpu, ...] = ()
    interfaces: tuple[Interface, ...] = ()
    fabric: tuple[FabricPort, ...] = ()
    busy_ports: tuple[int, ...] = ()
    shm_bytes: int | None = None
    shm_free_bytes: int | None = None
    limits: Limits | None = None
    disks: tuple[Disk, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)
    failures: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Canary:
    """What node `reader` saw of files that the others had written to the run's folder and synced before. slowest_s:
    until it had read the last of those that it came to see, and who had written that. unseen: writer → what was there
    instead when the deadline came."""

    reader: int
    slowest_s: float = 0.0
    slowest: int | None = None
    unseen: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Clock:
    """How far node `rank`'s clock is ahead of node 0's, in seconds, give or take `uncertainty_s`."""

    rank: int
    offset_s: float
    uncertainty_s: float


@dataclass(frozen=True)
class Pair:
    """Two nodes, first < second, that sent to each other at the same time. gb_s: 10⁹ bytes per second each way; None
    when it failed, and then `error` says how. device: index of the GPU, 0 on CPUs."""

    first: int
    second: int
    device: int
    gb_s: float | None
    error: str = ""


@dataclass(frozen=True)
class AllReduce:
    """One over all nodes. gb_s: bus bandwidth, 2(n−1)/n · bytes / seconds, which does not depend on their number (NCCL
    tests, doc/PERFORMANCE.md); None when it failed on `rank`."""

    rank: int
    gb_s: float | None
    error: str = ""


@dataclass(frozen=True)
class Observed:
    """Everything the rules look at. expected_nodes: how many were to come. missing: rank → the name, or '', of a node
    that did not come in time. lost: rank → what it did not answer any more."""

    nodes: tuple[NodeFacts, ...]
    expected_nodes: int = 1
    backend: str = ""
    missing: Mapping[int, str] = field(default_factory=dict)
    lost: Mapping[int, str] = field(default_factory=dict)
    canaries: tuple[Canary, ...] = ()
    clocks: tuple[Clock, ...] = ()
    pairs: tuple[Pair, ...] = ()
    all_reduce: tuple[AllReduce, ...] = ()

    def name(self, rank: int) -> str:
        """Of a node that came or not; host names that several nodes have are told apart by rank."""
        found = {node.rank: node.name for node in self.nodes}
        name = found.get(rank) or self.missing.get(rank) or f"node {rank}"
        return f"{name}#{rank}" if list(found.values()).count(name) > 1 else name


def to_json(value: Any) -> bytes:
    return TypeAdapter(type(value)).dump_json(value)


def from_json(kind: type, text: bytes | str) -> Any:
    """pydantic.ValidationError names what does not fit `kind`."""
    return TypeAdapter(kind).validate_json(text)

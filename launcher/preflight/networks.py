"""By which addresses nodes reach each other. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface, IPv4Network

from launcher.preflight.facts import Interface, NodeFacts

LOCAL = ("lo", "docker", "br-", "virbr", "cni", "flannel", "cali", "veth", "podman")
"""Beginnings of the names of interfaces that lead to no other machine."""


@dataclass(frozen=True)
class Choice:
    """network: the subnet that all nodes have an address in; None when they have none in common, and use those by which
    they reach the rendezvous. interfaces: by rank; of a node that has none, nothing."""

    network: IPv4Network | None
    interfaces: Mapping[int, Interface]


def choose(nodes: Sequence[NodeFacts]) -> Choice:
    """A subnet in which every node has an address of its own, fabric before Ethernet, fast before slow."""
    candidates: dict[IPv4Network, dict[int, Interface]] = {}
    for node in nodes:
        for interface in node.interfaces:
            if interface.up and not _is_local(interface):
                network = IPv4Interface(f"{interface.address}/{interface.netmask}").network
                candidates.setdefault(network, {}).setdefault(node.rank, interface)
    common = {network: found for network, found in candidates.items()
              if len(found) == len({one.address for one in found.values()}) == len(nodes)}
    if common:
        network = max(common, key=lambda one: (_merit(list(common[one].values())), -int(one.network_address)))
        return Choice(network, common[network])
    return Choice(None, {node.rank: interface for node in nodes for interface in node.interfaces
                         if interface.address == node.route_address})


def _merit(interfaces: Sequence[Interface]) -> tuple[bool, float]:
    """That of the least: whether it stands on the fabric, how fast it is."""
    return (all(one.fabric for one in interfaces), min(one.speed_gbit or 0.0 for one in interfaces))


def _is_local(interface: Interface) -> bool:
    address = IPv4Address(interface.address)
    return interface.name.startswith(LOCAL) or address.is_loopback or address.is_link_local


def matches(setting: str, name: str) -> bool:
    """Whether NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME lets an interface be used: a list of beginnings; exact names
    after '=', all others after '^' (NCCL documentation, environment variables)."""
    exact, others = "=" in setting[:2], "^" in setting[:2]
    names = [part for part in setting.lstrip("^=").split(",") if part]
    found = any(name == one if exact else name.startswith(one) for one in names)
    return found != others

"""What is wrong between nodes."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import IPv4Address

from launcher.preflight.facts import Observed, Pair
from launcher.preflight.findings import Expected, Finding, odd_ones
from launcher.preflight.networks import choose, matches
from launcher.preflight.tournament import SLOW, slow_nodes, slow_pairs, speeds

LAG_S = 5.0
"""A run reads what another node wrote (checkpoints, publications on disk) right after it was told of it."""
SKEW_S, LARGE_SKEW_S = 1.0, 60.0
"""Clocks further apart than the first make logs unreadable; than the second, munge and TLS begin to refuse."""
FABRIC_USE = 0.4
"""Least share of an RDMA port's rate at which NCCL moves large messages; over TCP it gets a tenth."""


def nodes(observed: Observed, expected: Expected) -> Iterator[Finding]:
    came = f"{len(observed.nodes)} of {observed.expected_nodes} nodes"
    for rank in sorted(observed.missing):
        yield Finding("error", "nodes", rank, f"node {rank} did not come to the rendezvous in time", came, "all",
                      "is it up, was the command started on it, does a firewall close the rendezvous port?",
                      blames_node=True)
    for rank, what in sorted(observed.lost.items()):
        yield Finding("error", "nodes", rank, "stopped answering", what, "an answer",
                      "its own output says why; sinfo -R and dmesg on the node when there is none", blames_node=True)


def same_machine(observed: Observed, expected: Expected) -> Iterator[Finding]:
    for host in sorted({node.hostname for node in observed.nodes}):
        ranks = [node.rank for node in observed.nodes if node.hostname == host]
        if len(ranks) > 1:
            yield Finding("warning", "one node per machine", None,
                          f"nodes {', '.join(map(str, ranks))} are one machine", host, "one each",
                          "srun --ntasks-per-node=1")


def fabric_ports(observed: Observed, expected: Expected) -> Iterator[Finding]:
    told = [node for node in observed.nodes if "networks" not in node.failures]
    for name in sorted({port.name for node in told for port in node.fabric}):
        ports = {node.rank: next((port for port in node.fabric if port.name == name), None) for node in told}
        states = {rank: port.state if port else "none" for rank, port in ports.items()}
        for rank, state, common, majority in odd_ones(states):
            if common == "ACTIVE" or (not majority and state != "ACTIVE"):
                physical = f" ({ports[rank].physical})" if ports[rank] else ""
                yield Finding("error", "fabric ports", rank, f"port {name}", state + physical, "ACTIVE",
                              "ibstat on the node: Polling is a cable, INIT a missing subnet manager",
                              blames_node=majority)
        rates = {rank: port.rate_gbit for rank, port in ports.items() if port and port.state == "ACTIVE"}
        for rank, rate, common, majority in odd_ones(rates):
            if rate < common:
                yield Finding("error", "fabric ports", rank, f"port {name}: rate", f"{rate:g} Gbit/s",
                              f"{common:g} Gbit/s",
                              "a bad cable or transceiver made the link fall back: ibdiagnet, mlxlink",
                              blames_node=majority)
    for node in told:
        if any(port.state == "ACTIVE" for port in node.fabric):
            for port in node.fabric:
                if len(told) == 1 and port.state != "ACTIVE":
                    yield Finding("warning", "fabric ports", node.rank, f"port {port.name}",
                                  f"{port.state} ({port.physical})", "ACTIVE, as other ports",
                                  "ibstat on the node: Polling is a cable, INIT a missing subnet manager")


def network(observed: Observed, expected: Expected) -> Iterator[Finding]:
    if len(observed.nodes) < 2 or _on_loopback(observed):
        return
    choice = choose(observed.nodes)
    if choice.network is None:
        ways = sorted({f"{one.name} {one.address}" for one in choice.interfaces.values()})
        yield Finding("warning", "network", None, "no network in which all nodes have an address of their own",
                      ", ".join(ways[:4]) or "none", "a common one", "these are on the nodes' way to the rendezvous; "
                      "if it is the wrong way, set NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME")
    for node in observed.nodes:
        if node.rank not in choice.interfaces and "networks" not in node.failures:
            yield Finding("error", "network", node.rank, "no interface leads to the other nodes",
                          ", ".join(f"{one.name} {one.address}" for one in node.interfaces) or "none", "one that is up",
                          "ip addr on the node: is an interface down?", blames_node=True)


def link(observed: Observed, expected: Expected) -> Iterator[Finding]:
    chosen = choose(observed.nodes).interfaces
    for rank, mtu, common, _ in odd_ones({rank: one.mtu for rank, one in chosen.items()}):
        yield Finding("warning", "link", rank, f"MTU of {chosen[rank].name}", str(mtu), str(common),
                      f"ip link set {chosen[rank].name} mtu {common}: large packets get lost between different ones")
    for rank, speed, common, majority in odd_ones({r: one.speed_gbit for r, one in chosen.items() if one.speed_gbit}):
        if speed < common:
            yield Finding("error", "link", rank, f"speed of {chosen[rank].name}", f"{speed:g} Gbit/s",
                          f"{common:g} Gbit/s", "a bad cable or port made the link fall back: ethtool on the node",
                          blames_node=majority)


def host_name(observed: Observed, expected: Expected) -> Iterator[Finding]:
    if len(observed.nodes) < 2 or _on_loopback(observed):
        return
    chosen = choose(observed.nodes).interfaces
    for node in observed.nodes:
        if "networks" in node.failures or "GLOO_SOCKET_IFNAME" in node.variables:
            continue
        if not node.own_address or IPv4Address(node.own_address).is_loopback:
            name = chosen[node.rank].name if node.rank in chosen else "…"
            yield Finding("warning", "host name", node.rank, f"what the node's own name, {node.hostname}, resolves to",
                          node.own_address or "nothing", "an address that other nodes reach",
                          f"export GLOO_SOCKET_IFNAME={name}, or mend /etc/hosts: gloo listens there otherwise")


def network_variables(observed: Observed, expected: Expected) -> Iterator[Finding]:
    told = [node for node in observed.nodes if "networks" not in node.failures]
    for name in sorted({name for node in told for name in node.variables}):
        for rank, value, common, _ in odd_ones({node.rank: node.variables.get(name, "not set") for node in told}):
            yield Finding("warning", "network variables", rank, f"{name} differs between nodes", value, common,
                          "set it in one place: cluster.slurm.setup")
    for node in told:
        for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
            setting = node.variables.get(name)
            if setting and not any(one.up and matches(setting, one.name) for one in node.interfaces):
                yield Finding("error", "network variables", node.rank, f"{name} allows none of this node's interfaces",
                              setting, "one of " + ", ".join(sorted({one.name for one in node.interfaces if one.up})),
                              f"unset {name}, or name an interface that all nodes have")
        active = [port.name for port in node.fabric if port.state == "ACTIVE"]
        if active and node.variables.get("NCCL_IB_DISABLE", "0") != "0":
            yield Finding("warning", "network variables", node.rank, "NCCL_IB_DISABLE, though there is a fabric",
                          node.variables["NCCL_IB_DISABLE"], "0", "unset NCCL_IB_DISABLE")


def shared_folder(observed: Observed, expected: Expected) -> Iterator[Finding]:
    readers = {canary.reader: canary for canary in observed.canaries}
    others = len(readers) - 1
    blind = {rank for rank, canary in readers.items() if others > 1 and 2 * len(canary.unseen) > others}
    hidden = {rank for rank in readers if others > 1
              and 2 * sum(rank in canary.unseen for canary in readers.values()) > others}
    outside = blind | hidden if 2 * len(blind | hidden) < len(readers) else set()
    for rank, canary in sorted(readers.items()):
        if unseen := {w: seen for w, seen in canary.unseen.items() if rank in outside or w not in outside}:
            writer, seen = next(iter(unseen.items()))
            yield Finding("error", "shared folder", rank,
                          f"files of {_few([observed.name(one) for one in unseen])} in the run's folder", seen,
                          f"what {observed.name(writer)} wrote", "the folder of the run has to be on a file system "
                          "that all nodes share: is it mounted here? (mount, df)", blames_node=rank in outside)
        elif rank in outside:
            yield Finding("error", "shared folder", rank, "files that this node wrote to the run's folder",
                          "other nodes do not see them", "they do", "is the shared file system mounted on this node? "
                          "(mount, df)", blames_node=True)
        if canary.slowest is not None and canary.slowest_s > LAG_S:
            yield Finding("warning", "shared folder", rank,
                          f"until a synced file of {observed.name(canary.slowest)} was seen",
                          f"{canary.slowest_s:.1f} s", f"at most {LAG_S:g} s",
                          "attributes are cached: mount with noac or actimeo=1, or use another file system for runs")


def clocks(observed: Observed, expected: Expected) -> Iterator[Finding]:
    offsets = sorted([0.0, *(clock.offset_s for clock in observed.clocks)])
    typical = offsets[(len(offsets) - 1) // 2]
    known = {clock.rank: (clock.offset_s, clock.uncertainty_s) for clock in observed.clocks}
    if observed.clocks and 0 not in known:
        known[0] = (0.0, max(clock.uncertainty_s for clock in observed.clocks))
    for rank, (offset, uncertainty) in sorted(known.items()):
        skew = offset - typical
        if abs(skew) - uncertainty > SKEW_S:
            yield Finding("error" if abs(skew) - uncertainty > LARGE_SKEW_S else "warning", "clocks", rank,
                          "clock beside the typical node's", f"{skew:+.2f} s, give or take {uncertainty:.3f} s",
                          f"within {SKEW_S:g} s", "is chronyd or ntpd running? chronyc makestep",
                          blames_node=len(known) > 2 and abs(skew) > LARGE_SKEW_S)


def connections(observed: Observed, expected: Expected) -> Iterator[Finding]:
    failed: dict[int, list[Pair]] = {}
    met: dict[int, int] = {}
    for pair in observed.pairs:
        for rank in (pair.first, pair.second):
            met[rank] = met.get(rank, 0) + 1
            if pair.gb_s is None:
                failed.setdefault(rank, []).append(pair)
    cut_off = {rank for rank, pairs in failed.items() if met[rank] > 1 and 2 * len(pairs) > met[rank]}
    for rank in sorted(cut_off):
        yield Finding("error", "connections", rank, f"exchanges with {len(failed[rank])} of {met[rank]} nodes failed",
                      failed[rank][0].error, "all succeed",
                      "firewall, or the wrong interface: nodes connect on ports above 1024 of the network below",
                      blames_node=2 * len(cut_off) < len(met))
    for pair in observed.pairs:
        if pair.gb_s is None and not {pair.first, pair.second} & cut_off:
            yield Finding("error", "connections", pair.first, f"exchange with {observed.name(pair.second)} failed",
                          pair.error, "success", "firewall, or the wrong interface, between the two nodes")


def bandwidth(observed: Observed, expected: Expected) -> Iterator[Finding]:
    found = speeds(observed.pairs)
    typical = sorted(found.values())[len(found) // 2] if found else 0.0
    for rank, speed in sorted(slow_nodes(observed.pairs, SLOW).items()):
        if speed:
            yield Finding("error", "bandwidth", rank, "median over its pairs", f"{speed:.3g} GB/s",
                          f"{typical:.3g} GB/s, as the typical node", "cable, port or NIC of the node, or another "
                          "job's traffic: leave it out; all others wait for it", blames_node=True)
    for pair, expected_speed in slow_pairs(observed.pairs, SLOW):
        yield Finding("warning", "slow path", pair.first, f"to {observed.name(pair.second)}", f"{pair.gb_s:.3g} GB/s",
                      f"{expected_speed:.3g} GB/s, as to others",
                      "a link between their switches, or other jobs' traffic: measure again")


def all_reduce(observed: Observed, expected: Expected) -> Iterator[Finding]:
    for one in observed.all_reduce:
        if one.gb_s is None:
            yield Finding("error", "all-reduce", one.rank, "an all-reduce over all nodes", one.error, "success",
                          "see what else is said of connections; NCCL_DEBUG=INFO says more")


def nccl_on_fabric(observed: Observed, expected: Expected) -> Iterator[Finding]:
    """Only where every node is equally slow does no comparison of nodes show it."""
    rates = [port.rate_gbit for node in observed.nodes for port in node.fabric if port.state == "ACTIVE"]
    measured = sorted(pair.gb_s for pair in observed.pairs if pair.gb_s is not None)
    if observed.backend != "nccl" or not rates or not measured:
        return
    typical, least = measured[len(measured) // 2], FABRIC_USE * min(rates) / 8
    if typical < least:
        yield Finding("error", "NCCL on fabric", None, "the typical pair of nodes", f"{typical:.3g} GB/s",
                      f"at least {least:.3g} GB/s, of a port's {min(rates) / 8:.3g} GB/s", "NCCL seems to go over TCP: "
                      "NCCL_DEBUG=INFO should say NET/IB; look at NCCL_IB_HCA and at libibverbs in the container")


RULES = (nodes, same_machine, fabric_ports, network, link, host_name, network_variables, shared_folder, clocks,
         connections, bandwidth, all_reduce, nccl_on_fabric)


def _on_loopback(observed: Observed) -> bool:
    """Whether all nodes meet on the loopback interface, and so are one machine."""
    ways = [node.route_address for node in observed.nodes]
    return all(way and IPv4Address(way).is_loopback for way in ways)


def _few(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")

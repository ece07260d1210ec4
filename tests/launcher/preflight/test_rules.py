"""Every check finds what breaks it, names the node, and finds nothing on machines without a fault."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
from healthy_nodes import GB, VERSIONS, cluster, gpu, node, with_gpu, with_node
from hypothesis import given, settings, strategies as st

from launcher.preflight.facts import (
    AllReduce,
    Canary,
    Clock,
    Disk,
    FabricPort,
    GpuProcess,
    Interface,
    Limits,
    NodeFacts,
    Observed,
    Pair,
    from_json,
    to_json,
)
from launcher.preflight.findings import CHECKS, Expected
from launcher.preflight.report import as_json, as_text
from launcher.preflight.rules import diagnose, to_exclude

NEEDED = Expected(8, "h100-80g")
DOCS = Path(__file__).parents[3] / "docs" / "preflight.md"


def on(rank, **changes):
    return with_node(cluster(), rank, **changes)


def gpu_of(rank, **changes):
    return with_gpu(cluster(), rank, 5, **changes)


def disks(**changes):
    found = {disk.purpose: disk for disk in node(0).disks}
    return {"disks": tuple(replace(disk, **changes.get(purpose, {})) for purpose, disk in found.items())}


def ports_of(**changes):
    ports = list(node(0).fabric)
    return {"fabric": (ports[0], replace(ports[1], **changes), *ports[2:])}


def ethernet(rank, **changes):
    lo, eth0 = node(rank).interfaces
    return {"interfaces": (lo, replace(eth0, **changes))}


def pairs(slow, speed, **changes):
    return cluster(pairs=tuple(
        replace(Pair(a, b, 0, speed), **changes) if slow(a, b) else Pair(a, b, 0, 45.0)
        for a, b in combinations(range(4), 2)))


def canaries(*unseen):
    """unseen: (reader, writer)."""
    return cluster(canaries=tuple(Canary(reader, 0.1, None, {w: "No such file or directory" for r, w in unseen
                                                            if r == reader}) for reader in range(4)))


BREAKS = [
    # check, severity, ranks that are named, whether they are to blame, what is observed, words of measured and expected
    ("nodes", "error", [3], True, cluster(nodes=cluster().nodes[:3], missing={3: "node3"}), "3 of 4 nodes"),
    ("nodes", "error", [2], True, cluster(lost={2: "when it was asked for the time"}), "asked for the time"),
    ("one node per machine", "warning", [None], False, on(3, hostname="node2"), "node2"),
    ("probes", "error", [1], True, on(1, failures={"run folder": "no answer within 60 s"}), "no answer within 60 s"),
    ("versions", "error", [2], True, on(2, versions=VERSIONS | {"NCCL": "2.20.5"}), "2.20.5 2.27.3"),
    ("versions", "error", [2], True, on(2, versions={k: v for k, v in VERSIONS.items() if k != "ray"}), "none 2.60.0"),
    ("versions", "warning", [0], False, on(0, versions=VERSIONS | {"driver": "550.1"}), "550.1 580.65"),
    ("GPU count", "error", [1], True, on(1, gpus=node(1).gpus[:7]), "7 8"),
    ("GPU model", "error", [1] * 9, True, on(1, gpus=tuple(gpu(i, name="NVIDIA A100") for i in range(8))), "A100 h100"),
    ("GPU model", "error", [1], False, gpu_of(1, total_bytes=60 * GB, free_bytes=60 * GB), "60.0 GB h100-80g"),
    ("ECC", "error", [2], True, gpu_of(2, volatile_ecc=3), "3 0"),
    ("ECC", "warning", [2], False, gpu_of(2, aggregate_ecc=2), "2 0"),
    ("ECC", "warning", [2], False, gpu_of(2, ecc=False), "off on"),
    ("GPU repair", "error", [0], True, gpu_of(0, pending_repair=True), "wait"),
    ("GPU repair", "error", [0], True, gpu_of(0, failed_repair=True), "could not"),
    ("throttling", "error", [3], True, gpu_of(3, throttle=("heat (hardware)", "power cap")), "heat (hardware) nothing"),
    ("throttling", "warning", [3], False, gpu_of(3, throttle=("power cap",)), "power cap"),
    ("GPU clocks", "error", [3], True, gpu_of(3, max_sm_mhz=1200), "1200 MHz 1980 MHz"),
    ("GPU power", "error", [1], True, gpu_of(1, power_limit_w=400.0), "400 W 700 W"),
    ("GPU power", "warning", [1], False, gpu_of(1, power_limit_w=400.0), "400 W 700 W"),
    ("GPU memory", "error", [1], True, gpu_of(1, free_bytes=40 * GB), "40.0 GB"),
    ("foreign processes", "error", [2], True, gpu_of(2, processes=(GpuProcess(77, "python", "ann", 9 * GB),)),
     "pid 77, 9.0 GB"),
    ("PCIe", "warning", [0], False, gpu_of(0, pcie_width=8), "x8 x16"),
    ("NVLink", "error", [0, 0], True, gpu_of(0, nvlinks=12), "12 18"),
    ("fabric ports", "error", [1], True, on(1, **ports_of(state="DOWN", physical="Polling")), "DOWN (Polling) ACTIVE"),
    ("fabric ports", "error", [1], True, on(1, **ports_of(rate_gbit=100.0)), "100 Gbit/s 400 Gbit/s"),
    ("fabric ports", "error", [1], True, on(1, fabric=node(1).fabric[:3]), "none ACTIVE"),
    ("fabric ports", "warning", [0], False, replace(cluster(1), nodes=(node(0, **ports_of(state="INIT")),)), "INIT"),
    ("network", "warning", [None], False, on(2, **ethernet(2, netmask="255.255.255.255")), "eth0 10.0.0.1"),
    ("network", "error", [2], True, on(2, interfaces=node(2).interfaces[:1]), "lo 127.0.0.1"),
    ("link", "warning", [2], False, on(2, **ethernet(2, mtu=1500)), "1500 9000"),
    ("link", "error", [2], True, on(2, **ethernet(2, speed_gbit=10.0)), "10 Gbit/s 100 Gbit/s"),
    ("host name", "warning", [1], False, on(1, own_address="127.0.1.1"), "127.0.1.1"),
    ("host name", "warning", [1], False, on(1, own_address=""), "nothing"),
    ("network variables", "warning", [1], False, on(1, variables={}), "not set mlx5"),
    ("network variables", "error", [0, 1, 2, 3], False,
     cluster(nodes=tuple(node(i, variables={"NCCL_SOCKET_IFNAME": "bond"}) for i in range(4))), "bond one of eth0, lo"),
    ("network variables", "warning", [0, 1, 2, 3], False,
     cluster(nodes=tuple(node(i, variables={"NCCL_IB_DISABLE": "1"}) for i in range(4))), "1 0"),
    ("shared folder", "error", [2], True, canaries((0, 2), (1, 2), (3, 2), (2, 0), (2, 1), (2, 3)), "No such"),
    ("shared folder", "error", [3], True, canaries((0, 3), (1, 3), (2, 3)), "other nodes do not see them"),
    ("shared folder", "error", [1], False, canaries((1, 2)), "No such file"),
    ("shared folder", "warning", [0], False,
     cluster(canaries=(Canary(0, 31.0, 2), *cluster().canaries[1:])), "31.0 s at most 5 s"),
    ("clocks", "warning", [2], False, cluster(clocks=(Clock(1, 0, .001), Clock(2, -7, .001), Clock(3, 0, .001))),
     "-7.00 s within 1 s"),
    ("clocks", "error", [0], True, cluster(clocks=tuple(Clock(rank, 3600.0, .001) for rank in (1, 2, 3))),
     "-3600.00 s"),
    ("connections", "error", [3], True, pairs(lambda a, b: 3 in (a, b), None, error="refused"), "refused"),
    ("connections", "error", [0], False, pairs(lambda a, b: (a, b) == (0, 2), None, error="refused"), "refused"),
    ("bandwidth", "error", [1], True, pairs(lambda a, b: 1 in (a, b), 20.0), "20 GB/s 45 GB/s"),
    ("slow path", "warning", [0], False, pairs(lambda a, b: (a, b) == (0, 2), 20.0), "20 GB/s 45 GB/s"),
    ("all-reduce", "error", [3], False, cluster(all_reduce=(AllReduce(3, None, "timed out"),)), "timed out"),
    ("NCCL on fabric", "error", [None], False, pairs(lambda a, b: True, 3.0), "3 GB/s at least 20 GB/s"),
    ("ports", "error", [0], True, on(0, busy_ports=(6379,)), "in use"),
    ("/dev/shm", "error", [3], True, on(3, shm_bytes=64 << 20), "67.1 MB 1.1 GB"),
    ("/dev/shm", "error", [3], True, on(3, shm_free_bytes=10), "10 bytes"),
    ("open files", "warning", [1], False, on(1, limits=Limits((20000, None), (None, None))), "20000 at least 65536"),
    ("open files", "error", [1], False, on(1, limits=Limits((1024, 1024), (None, None))), "1024"),
    ("locked memory", "error", [2], False, on(2, limits=Limits((None, None), (8 << 20, None))), "8.4 MB unlimited"),
    ("disk space", "error", [2], False, on(2, **disks(run={"free_bytes": GB})), "1.0 GB at least 20.0 GB"),
    ("disk space", "error", [2], True, on(2, **disks(temporary={"free_bytes": GB})), "1.0 GB at least 10.0 GB"),
    ("disk speed", "warning", [2], False, on(2, **disks(run={"write_mb_s": 9.0})), "9 MB/s at least 100 MB/s"),
    ("disk speed", "error", [2], False, on(2, **disks(run={"write_mb_s": None})), "cannot be written to"),
    ("import time", "warning", [1], False, on(1, import_s=40.0), "40 s at most 34 s"),
]


def test_machines_without_a_fault_are_said_to_have_none():
    for size in (1, 2, 3, 16):
        assert diagnose(cluster(size), NEEDED) == diagnose(cluster(size), Expected()) == []


@pytest.mark.parametrize(("check", "severity", "ranks", "blamed", "observed", "words"), BREAKS,
                         ids=[f"{one[0]}-{one[1]}-{i}" for i, one in enumerate(BREAKS)])
def test_what_is_broken_is_found_and_nothing_else(check, severity, ranks, blamed, observed, words):
    found = diagnose(observed, NEEDED)
    assert {one.check for one in found} == {check}, found
    found = [one for one in found if one.severity == severity]
    assert [one.rank for one in found] == ranks
    assert any(one.blames_node for one in found) == blamed
    assert any(all(word in f"{one.measured} {one.expected}" for word in words.split()) for one in found), found
    assert all(one.remedy and one.measured and one.expected for one in found)
    assert to_exclude(observed, found) == ([observed.name(rank) for rank in dict.fromkeys(
        one.rank for one in found if one.blames_node)] if severity == "error" else [])


def test_every_check_is_broken_here_and_has_its_row_in_the_docs():
    assert {one[0] for one in BREAKS} == set(CHECKS)
    rows = re.findall(r"^\| `([^`]+)` \|", DOCS.read_text(encoding="utf-8"), re.MULTILINE)
    assert rows == list(CHECKS)


def test_everything_wrong_is_said_at_once_errors_first():
    observed = with_gpu(with_gpu(with_node(cluster(), 2, busy_ports=(6379,)), 1, 0, volatile_ecc=1), 3, 4, ecc=False)
    found = diagnose(observed, NEEDED)
    assert [(one.severity, one.check, one.rank) for one in found] == [
        ("error", "ECC", 1), ("error", "ports", 2), ("warning", "ECC", 3)]


def test_a_fault_that_most_nodes_have_excludes_none():
    observed = with_node(cluster(), 3, busy_ports=(6379,))
    for rank, excluded in enumerate((["node0", "node3"], ["node0", "node1", "node3"], ["node3"])):
        observed = with_gpu(observed, rank, 0, volatile_ecc=1)
        assert to_exclude(observed, diagnose(observed, NEEDED)) == excluded
    alone = with_gpu(cluster(1), 0, 0, volatile_ecc=1)
    assert to_exclude(alone, diagnose(alone, NEEDED)) == []


def test_of_two_nodes_with_different_versions_none_is_to_blame():
    (found,) = diagnose(with_node(cluster(2), 1, versions=VERSIONS | {"torch": "2.12.0"}), NEEDED)
    assert (found.rank, found.blames_node, found.severity) == (1, False, "error")


def test_too_few_gpus_on_all_nodes_are_a_wrong_request():
    observed = cluster(nodes=tuple(node(rank, gpus=node(rank).gpus[:4]) for rank in range(4)))
    found = diagnose(observed, NEEDED)
    assert {one.check for one in found} == {"GPU count"} and not any(one.blames_node for one in found)
    assert diagnose(observed, Expected()) == []


@settings(max_examples=40)
@given(st.lists(st.sampled_from(range(len(BREAKS))), min_size=1, max_size=3), st.randoms())
def test_node_facts_that_are_broken_twice_have_both_findings(chosen, random):
    """Faults do not hide each other: what each of several nodes has is found beside what others have."""
    of_one = [BREAKS[i] for i in chosen if BREAKS[i][4].nodes != cluster().nodes and len(BREAKS[i][4].nodes) == 4
              and sum(a != b for a, b in zip(BREAKS[i][4].nodes, cluster().nodes)) == 1 and BREAKS[i][0] not in (
                  "network", "host name", "link", "one node per machine")]
    nodes = list(cluster(9).nodes)
    for place, (_, _, ranks, _, observed, _) in enumerate(of_one):
        broken = observed.nodes[ranks[0]]
        mine = nodes[place]
        nodes[place] = replace(broken, rank=place, name=mine.name, hostname=mine.hostname, interfaces=mine.interfaces,
                               own_address=mine.own_address, route_address=mine.route_address)
    random.shuffle(nodes)
    found = {(one.check, one.rank) for one in diagnose(cluster(9, nodes=tuple(nodes)), NEEDED)}
    assert found >= {(check, place) for place, (check, *_) in enumerate(of_one)}


@pytest.mark.parametrize("observed", [one[4] for one in BREAKS[::4]])
def test_what_was_observed_survives_json_and_is_shown(observed):
    assert from_json(Observed, to_json(observed)) == observed
    found = diagnose(observed, NEEDED)
    text = as_text(observed, found, ["node9"], 3.0)
    assert text.splitlines()[1].startswith(found[0].severity.upper())
    assert all(one.what in text and one.remedy in text and one.measured in text for one in found[:3])
    assert "to be left out: node9" in text
    as_object = json.loads(json.dumps(as_json(observed, found, [], 3.0)))
    assert as_object["ok"] == (as_object["errors"] == 0) and len(as_object["findings"]) == len(found)
    assert from_json(Observed, json.dumps(as_object["observed"])) == observed


def test_hosts_of_one_name_are_told_apart():
    nodes = NodeFacts(0, "vm", "vm"), NodeFacts(1, "vm", "vm"), NodeFacts(2, "b", "b")
    observed = Observed(nodes, 4, missing={3: ""})
    assert [observed.name(rank) for rank in range(4)] == ["vm#0", "vm#1", "b", "node 3"]


def test_many_nodes_with_the_same_problem_take_one_row():
    observed = cluster(nodes=tuple(node(i, limits=Limits((100 + i, 100 + i), (None, None))) for i in range(4)))
    text = as_text(observed, diagnose(observed, NEEDED), [], 1.0)
    assert text.count("open files") == 4, "their hard limits, and so the remedies, differ"
    observed = cluster(nodes=tuple(node(i, limits=Limits((100 + i, None), (None, None))) for i in range(4)))
    text = as_text(observed, diagnose(observed, NEEDED), [], 1.0)
    assert text.count("open files") == 1 and "node0, node1, node2 and 1 more" in text and "100, 101, 102 and 1" in text


def test_an_interface_and_ports_of_one_node_alone_are_no_trouble():
    lo, port = Interface("lo", "127.0.0.1", "255.0.0.0", True, 65536), FabricPort(
        "mlx5_0/1", "DOWN", "Disabled", 10.0, "Ethernet")
    alone = node(0, interfaces=(lo,), fabric=(port,), disks=(Disk("run", "/x", "", 10**12, 500.0),))
    assert diagnose(Observed((alone,)), NEEDED) == []

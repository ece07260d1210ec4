"""The network is one on which nodes reach each other, the fastest of these."""

from __future__ import annotations

import pytest

from launcher.preflight.facts import Interface, NodeFacts
from launcher.preflight.networks import choose, matches


def interface(name, address, netmask="255.255.255.0", **more):
    return Interface(name, address, netmask, more.pop("up", True), 1500, **more)


def node(rank, *interfaces, route=""):
    return NodeFacts(rank, f"n{rank}", f"n{rank}", route_address=route, interfaces=interfaces)


def chosen(*nodes):
    found = choose(nodes)
    return found.network and str(found.network), {rank: one.name for rank, one in found.interfaces.items()}


def test_the_fabric_comes_before_faster_ethernet_and_names_may_differ():
    assert chosen(*(node(rank, interface("lo", "127.0.0.1"),
                         interface("docker0", "172.17.0.1", "255.255.0.0", speed_gbit=900.0),
                         interface("eth0", f"10.0.0.{rank + 1}", speed_gbit=800.0),
                         interface(f"ib{rank}", f"10.1.0.{rank + 1}", fabric=True, speed_gbit=400.0))
                    for rank in range(3))) == ("10.1.0.0/24", {0: "ib0", 1: "ib1", 2: "ib2"})


def test_a_fabric_that_one_node_lacks_is_not_chosen():
    nodes = [node(rank, interface("eth0", f"10.0.0.{rank + 1}"),
                  interface("ib0", f"10.1.0.{rank + 1}", fabric=True, up=rank != 1)) for rank in range(3)]
    assert chosen(*nodes) == ("10.0.0.0/24", {0: "eth0", 1: "eth0", 2: "eth0"})


def test_of_two_ethernets_the_one_whose_slowest_link_is_faster():
    nodes = [node(rank, interface("a", f"10.0.0.{rank + 1}", speed_gbit=(100.0, 1.0)[rank]),
                  interface("b", f"10.1.0.{rank + 1}", speed_gbit=25.0)) for rank in range(2)]
    assert chosen(*nodes)[0] == "10.1.0.0/24"


def test_an_address_that_all_nodes_have_leads_to_none_of_them():
    nodes = [node(rank, interface("bridge", "192.168.122.1", speed_gbit=100.0), interface("eth0", f"10.0.0.{rank + 1}"))
             for rank in range(2)]
    assert chosen(*nodes)[0] == "10.0.0.0/24"


def test_without_a_common_network_nodes_use_the_way_to_the_rendezvous():
    nodes = [node(rank, interface("x", f"10.9.{rank}.3"), interface("eth0", f"10.0.{rank}.2"), route=f"10.0.{rank}.2")
             for rank in range(2)]
    assert chosen(*nodes) == (None, {0: "eth0", 1: "eth0"})
    assert chosen(nodes[0], node(1, route="10.0.1.9")) == (None, {0: "eth0"})


@pytest.mark.parametrize(("setting", "name", "allowed"), [
    ("eth", "eth0", True), ("eth", "ib0", False), ("=eth", "eth0", False), ("=ib0,eth0", "eth0", True),
    ("^docker,lo", "eth0", True), ("^docker,lo", "docker0", False), ("^=eth0", "eth01", True),
    ("^=eth0", "eth0", False), ("ib,eth", "eth1", True)])
def test_the_words_of_nccl(setting, name, allowed):
    assert matches(setting, name) == allowed

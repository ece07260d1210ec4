"""A network of its own for each node, one of them with a bad cable: the preflight names it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

NODES, SLOW, RATE = 3, 2, "50mbit"
ROOT = Path(__file__).parents[3]


def sh(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr}")


@pytest.fixture
def networks():
    """Names of namespaces whose eth0, 10.78.0.1 and following, are joined by a bridge."""
    names = [f"pbsd{os.getpid()}n{rank}" for rank in range(NODES)]
    switch = f"pbsd{os.getpid()}s"
    try:
        try:
            sh("ip", "netns", "add", switch)
            sh("ip", "-n", switch, "link", "add", "br0", "type", "bridge")
            sh("ip", "-n", switch, "link", "set", "br0", "up")
        except OSError as error:
            pytest.skip(f"network namespaces need privileges: {error}")
        for rank, name in enumerate(names):
            sh("ip", "netns", "add", name)
            sh("ip", "-n", switch, "link", "add", f"v{rank}", "type", "veth", "peer", "name", "eth0", "netns", name)
            sh("ip", "-n", switch, "link", "set", f"v{rank}", "master", "br0", "up")
            sh("ip", "-n", name, "addr", "add", f"10.78.0.{rank + 1}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                sh("ip", "-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in (*names, switch):
            with suppress(OSError):
                sh("ip", "netns", "del", name)


@pytest.mark.slow
def test_the_node_with_the_bad_cable_is_excluded(networks, tmp_path):
    sh("tc", "-n", networks[SLOW], "qdisc", "add", "dev", "eth0", "root", "tbf", "rate", RATE, "burst", "64kb",
       "latency", "400ms")
    excluded = tmp_path / "excluded.txt"
    nodes = [subprocess.Popen(
        ["ip", "netns", "exec", name, sys.executable, "-m", "launcher.cli", "preflight", "--json", "--nodes",
         str(NODES), "--node-rank", str(rank), "--rendezvous", "10.78.0.1:23456", "--shared", str(tmp_path / "run"),
         "--exclude-file", str(excluded)], cwd=ROOT, env=os.environ | {"SLURMD_NODENAME": f"node{rank}"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for rank, name in enumerate(networks)]
    said = [node.communicate(timeout=300) for node in nodes]
    assert [node.returncode for node in nodes] == [1] * NODES, said
    found = json.loads(said[0][0])
    assert found["network"] == {"subnet": "10.78.0.0/24",
                                "interfaces": {f"node{rank}": "eth0" for rank in range(NODES)}}
    assert [one["node"] for one in found["findings"] if one["check"] == "bandwidth"] == [f"node{SLOW}"]
    assert all((pair["gb_s"] < 1.5 * 0.05 / 8) == (SLOW in (pair["first"], pair["second"]))
               for pair in found["observed"]["pairs"]), "the rate of the cable, and what its buffer holds more"
    assert found["exclude"] == excluded.read_text().split() == [f"node{SLOW}"]

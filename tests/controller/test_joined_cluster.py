"""A Ray cluster that exists already, here of two servers on one machine, each with an address of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from launcher.node.command import ray_folder
from launcher.node.member import port_block
from launcher.node.ray_server import RayServer, command
from megatron_pbsd.controller.joined_cluster import check_address
from megatron_pbsd.errors import UsageError
from megatron_pbsd.ports import free_port, is_free

ADDRESSES = ("127.0.0.2", "127.0.0.3")
DRIVER = """
import json, os, signal, sys, threading, time
from pathlib import Path
from megatron_pbsd.controller.failures import ComponentDied, DeadlineExpired
from megatron_pbsd.controller.gather import end_hung, gather
from megatron_pbsd.controller.placement import Demand
from megatron_pbsd.controller.runtime import open_runtime

class Part:
    def about(self):
        import ray
        return {"address": ray.util.get_node_ip_address(), "pid": os.getpid(), "folder": os.getcwd(),
                "interface": os.environ.get("GLOO_SOCKET_IFNAME")}
    def block(self, begun):
        Path(begun).touch()
        threading.Event().wait()
    def die(self):
        print("last words", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

said = {}
with open_runtime("ray", Path(sys.argv[1]), address=sys.argv[2], demand=Demand(1, 1, {"engine-0": 1})) as runtime:
    names = ("coordinator", "learner-0", "engine-0")
    parts = {name: runtime.spawn(name, Part) for name in names}
    said["about"] = {name: runtime.result(part.call("about")) for name, part in parts.items()}
    machines = {name: runtime.machine(name) for name in names}
    said["machines"] = {name: machine.address for name, machine in machines.items()}
    said["ports"] = [machine.free_port() for machine in machines.values()]
    folders = [machine.memory_folder() for machine in machines.values()]
    said["folders"] = [folders[0] == folders[1], folders[1] == folders[2], all(map(os.path.isdir, folders))]

    begun = Path(sys.argv[1]) / "block-has-begun"
    blocked = parts["learner-0"].call("block", str(begun))
    while not begun.exists():
        time.sleep(0.05)
    said["stack"] = runtime.stacks([blocked])
    os.kill(said["about"]["engine-0"]["pid"], signal.SIGSTOP)
    stopped = parts["engine-0"].call("about")
    try:
        gather(runtime, [stopped], phase="test", deadline_s=0.5)
    except DeadlineExpired as expired:
        said["expired"] = str(expired)
        end_hung(runtime, expired, [stopped])
    said["ended"] = not os.path.exists(f"/proc/{said['about']['engine-0']['pid']}")
    again = runtime.spawn("engine-0", Part)
    try:
        runtime.result(again.call("die"))
    except ComponentDied as died:
        said["died"] = str(died)

    os.kill(int(sys.argv[3]), signal.SIGKILL)   # the second server
    while sum(node["Alive"] for node in __import__("ray").nodes()) > 1:
        time.sleep(0.05)
    moved = runtime.spawn("engine-0", Part)
    said["moved"] = runtime.result(moved.call("about"))["address"]
said["left"] = [folder for folder in folders[:2] if os.path.exists(folder)]
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What a driver found out that joined the cluster."""
    logs = tmp_path_factory.mktemp("logs")
    environ = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "of this test alone",
               "PYTHONPATH": str(Path(__file__).parents[2])}
    with ExitStack() as stack:
        head = None
        for rank, address in enumerate(ADDRESSES):
            ports, folder = port_block(str(os.getpid()), rank, is_free), ray_folder()
            server = RayServer(command(address, ports, 0, folder, head), environ, logs / f"ray-{rank}.log", folder)
            stack.callback(server.close)
            server.wait(60.0)
            head = head or f"{address}:{ports[0]}"
        done = subprocess.run(
            [sys.executable, "-c", DRIVER, str(logs / "run"), head, str(server.pid)], env=environ, cwd=logs,
            capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout) | {"cwd": str(logs)}


def test_components_are_on_the_machines_that_they_have_places_on(said):
    expected = {"coordinator": "127.0.0.2", "learner-0": "127.0.0.2", "engine-0": "127.0.0.3"}
    assert {name: about["address"] for name, about in said["about"].items()} == expected == said["machines"]


def test_they_work_as_if_the_driver_had_started_them(said):
    assert {about["folder"] for about in said["about"].values()} == {said["cwd"]}
    assert said["about"]["coordinator"]["interface"] == "lo"


def test_each_machine_has_ports_and_a_folder_in_memory(said):
    assert len(set(said["ports"])) == 3
    assert said["folders"] == [True, False, True] and said["left"] == []


def test_processes_are_reached_by_their_machines(said):
    assert "in block" in said["stack"]
    assert "engine-0" in said["expired"] and "does not react to signals" in said["expired"] and said["ended"]
    assert "engine-0 died: " in said["died"] and "engine-0 | last words" in said["died"]


def test_an_engine_whose_machine_is_gone_is_started_on_another(said):
    assert said["moved"] == "127.0.0.2"


@pytest.mark.parametrize(("address", "message"), [
    ("nowhere", "expected HOST:PORT"), ("{free}", "nobody answers there .*refused")])
def test_an_address_without_a_cluster_is_refused_at_once(address, message):
    with pytest.raises(UsageError, match=message):
        check_address(address.format(free=f"127.0.0.1:{free_port()}"))

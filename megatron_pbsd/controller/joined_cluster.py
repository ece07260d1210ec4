"""A Ray cluster that exists already, on one or many machines, of which the driver's is one.

An agent on each machine does what has to be done there: find free ports, keep the folder in shared memory, and reach
processes that no longer hear Ray.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from megatron_pbsd.controller.machine import Here
from megatron_pbsd.controller.placement import Demand, Node, Place, engine_of, place
from megatron_pbsd.controller.ray_cluster import init
from megatron_pbsd.controller.ray_host import Elsewhere, RayClient, RayHandle, WrongMachine
from megatron_pbsd.errors import UsageError

CONNECT_S = 5.0
AGENTS_S = 60.0
"""For a first process to start on every machine, from a file system that all of them read at once."""
OBSERVE = {"num_cpus": 0, "max_restarts": 0, "max_concurrency": 4}


class JoinedRay(RayClient):
    """See `runtime.Runtime`. Component `name` writes its output to `logs/<name>.log` on its machine.

    UsageError when there is no cluster at `address`, 'host:port', this machine is none of it, or it has too little for
    `demand`.
    """

    def __init__(self, logs: Path, address: str, demand: Demand):
        check_address(address)
        try:
            init(address=address)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise UsageError(f"--ray-address {address}: the Ray cluster there cannot be joined from "
                             f"{socket.gethostname()}: {error}") from error
        self._logs, self._demand = logs.resolve(), demand
        self._logs.mkdir(parents=True, exist_ok=True)
        self._handles: list[RayHandle] = []
        try:
            nodes = living_nodes()
            self._places = place(demand, nodes)
            self._machines = start_agents(nodes)
        except BaseException:
            ray.shutdown()
            raise
        self._first = nodes[0]

    @property
    def client(self) -> RayClient:
        return RayClient()

    def machine(self, name: str) -> Elsewhere:
        """That of a component which has not been placed is the driver's. Engines of which a part was on a machine that
        is gone get places among the others."""
        self._leave_lost(engine_of(name))
        at = self._places.get(name, Place(self._first))
        return replace(self._machines[at.node.id], device=at.device)

    def parts(self, name: str) -> list[str]:
        self._leave_lost(name)
        return self._parts(name) or [name]

    def _parts(self, engine: str) -> list[str]:
        return [part for part in self._places if engine_of(part) == engine]

    def spawn(self, name: str, factory: Callable[..., Any], /, *args: Any, **kwargs: Any) -> RayHandle:
        handle = RayHandle.start(
            name, str(self._logs / f"{name}.log"), self.machine(name), factory, *args, **kwargs)
        self._handles = [other for other in self._handles if other.name != name] + [handle]
        return handle

    def _leave_lost(self, engine: str) -> None:
        if engine not in self._demand.engines:
            return
        nodes, parts = [node for node in living_nodes() if node.id in self._machines], self._parts(engine)
        if all(self._places[part].node in nodes for part in parts):
            return
        others = {name: at for name, at in self._places.items() if name not in parts}
        # Without room elsewhere it stays lost: who spawns it hears that its machine is gone.
        with suppress(UsageError):
            self._places = place(self._demand, nodes, others)

    def share(self, value: Any) -> ray.ObjectRef:
        return ray.put(value)

    def close(self) -> None:
        """What the cluster is made of goes on."""
        self.end([handle.ready() for handle in self._handles])
        agents = [machine.agent for machine in self._machines.values()]
        ray.wait([agent.close.remote() for agent in agents], num_returns=len(agents), timeout=CONNECT_S)
        ray.shutdown()

    def __enter__(self) -> JoinedRay:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def check_address(address: str) -> None:
    """UsageError unless somebody listens at 'host:port'. Ray itself tries for a minute."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise UsageError(f"--ray-address {address!r}: expected HOST:PORT, as `ray start --head` prints it")
    try:
        socket.create_connection((host, int(port)), CONNECT_S).close()
    except OSError as error:
        raise UsageError(f"--ray-address {address}: nobody answers there ({error.strerror or error}); `ray start "
                         "--head` prints the address of the cluster that it starts") from error


def living_nodes() -> list[Node]:
    """The driver's first, the others by address."""
    here = ray.get_runtime_context().get_node_id()
    nodes = [Node(node["NodeID"], node["NodeManagerHostname"], node["NodeManagerAddress"],
                  int(node["Resources"].get("GPU", 0))) for node in ray.nodes() if node["Alive"]]
    return sorted(nodes, key=lambda node: (node.id != here, [int(part) if part.isdigit() else 0 for part in
                                                             node.address.split(".")], node.id))


def start_agents(nodes: list[Node]) -> dict[str, Elsewhere]:
    """Machines by Ray's ids. WrongMachine names those where no process starts."""
    agents = {node.id: ray.remote(**OBSERVE)(Here).options(
        scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False)).remote(node.address)
        for node in nodes}
    asked = {node.id: agents[node.id].network.remote() for node in nodes}
    ray.wait(list(asked.values()), num_returns=len(asked), timeout=AGENTS_S)
    machines, problems = {}, []
    for node in nodes:
        try:
            environment = ray.get(asked[node.id], timeout=0.0)
        except (GetTimeoutError, RayActorError) as error:
            problems.append(f"{node.host} ({node.address}): {type(error).__name__}")
            continue
        machines[node.id] = Elsewhere(node.host, node.address, node.id, agents[node.id], environment, os.getcwd())
    if problems:
        raise WrongMachine(f"no process has started within {AGENTS_S:g} s on " + "; ".join(problems))
    return machines

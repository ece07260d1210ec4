"""Which component runs on which machine: pure.

Learner ranks fill machines in their order, in whole tensor-parallel groups, so that what is exchanged the most stays on
one machine. Engines follow where most room is left, each whole, or in equal parts on as many machines as it needs; with
colocated devices they begin anew, on those of the learner. Components that compute little are on the driver's machine,
the first one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from megatron_pbsd.errors import UsageError


@dataclass(frozen=True)
class Node:
    """A machine. id: Ray's name for it. address: by which others reach it. gpus: that components may use."""

    id: str
    host: str
    address: str
    gpus: int = 0


@dataclass(frozen=True)
class Demand:
    """What has to be placed.

    ranks:      of the learner, one GPU each. tp: neighbouring ranks that stay on one machine.
    engines:    GPUs of each engine by its name; on machines without GPUs, what it counts as beside a learner rank.
    machines:   on how many an engine is, equally, by its name. One that is not named is on one, or on as many whole
                ones as its GPUs are.
    colocated:  engines use the learner's GPUs, and do not need others.
    """

    ranks: int
    tp: int = 1
    engines: Mapping[str, int] = field(default_factory=dict)
    colocated: bool = False
    machines: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Place:
    """device: the first of the machine's GPUs that is meant for the component; 0 on machines without."""

    node: Node
    device: int = 0


def part_name(engine: str, machine: int) -> str:
    """The component of an engine on its first, second … machine, from 0: the first is the engine itself."""
    return f"{engine}.node{machine}" if machine else engine


def engine_of(part: str) -> str:
    return part.partition(".")[0]


def place(demand: Demand, nodes: Sequence[Node], kept: Mapping[str, Place] | None = None) -> dict[str, Place]:
    """Component → where it runs. Learner ranks are `learner-<rank>`, parts of engines as `part_name` says. On machines
    without GPUs all have the same share. kept: components that have a place already, which they stay on.

    UsageError when the machines have too few GPUs, parallel groups have more members than one of them, or an engine
    does not divide over machines.
    """
    room = _Room(demand, nodes)
    places = dict(kept or {})
    for name in places:
        if engine_of(name) not in demand.engines:
            room.keep(places[name], 1)
    for first in range(0, demand.ranks, demand.tp):
        group = [f"learner-{rank}" for rank in range(first, first + demand.tp)]
        if group[0] in places:
            continue
        at = next((i for i in range(len(nodes)) if room.left(i) >= demand.tp), None)
        if at is None:
            raise _too_few(demand, nodes, f"learner ranks {first} to {first + demand.tp - 1}")
        places |= {name: room.take(at, 1) for name in group}
    if demand.colocated:
        room = _Room(demand, nodes)
    shares = {name: _share_of(name, demand, nodes) for name in demand.engines}
    for name, (_, size) in shares.items():
        for part in (part for part in places if engine_of(part) == name):
            room.keep(places[part], size)
    for name, (count, size) in shares.items():
        if name not in places:
            places |= _place_engine(name, count, size, demand, nodes, room)
    return places


def _place_engine(name: str, count: int, size: int, demand: Demand, nodes: Sequence[Node], room: _Room
                  ) -> dict[str, Place]:
    """On the `count` machines with most room, in the machines' order, which is that of the engine's ranks."""
    chosen = sorted(sorted(range(len(nodes)), key=lambda i: (-room.left(i), i))[:count])
    taken = [room.take(at, size) for at in chosen]
    if None in taken:
        raise _too_few(demand, nodes, name if count == 1 else f"a part of {name}, which is {size} GPUs of each of "
                                                              f"{count} machines")
    return {part_name(name, number): at for number, at in enumerate(taken)}


def _share_of(name: str, demand: Demand, nodes: Sequence[Node]) -> tuple[int, int]:
    """On how many machines an engine is, and its GPUs on each."""
    size, largest = demand.engines[name], max(node.gpus for node in nodes)
    count = demand.machines.get(name) or (-(-size // largest) if largest else 1)
    if count > len(nodes):
        most = max(n for n in range(1, len(nodes) + 1) if size % n == 0)
        wanted = f"{name} is to be on {count} machines" if name in demand.machines else (
            f"no machine has room for {name}, whose {size} GPUs are those of {count} machines")
        raise UsageError(f"{wanted}, and there are {len(nodes)}: ask for more machines (cluster.nodes), or "
                         + (f"set rollout.sglang.args.nnodes to {most}" if name in demand.machines else
                            f"for a smaller engine (tp_size * pp_size in rollout.sglang.args of at most "
                            f"{len(nodes) * largest})"))
    if size % count or (count > 1 and name not in demand.machines and size % largest):
        below = size // largest * largest
        raise UsageError(
            f"{name} has {size} GPUs (tp_size * pp_size in rollout.sglang.args) and does not fill machines of "
            f"{largest}: the nearest valid sizes are {below} and {below + largest}; or say with "
            "rollout.sglang.args.nnodes on how many it is to be divided equally")
    return count, size // count


class _Room:
    """What is free of each machine: of its GPUs, or of its share where there are none, which engines may exceed."""

    def __init__(self, demand: Demand, nodes: Sequence[Node]):
        self._nodes, self._scarce = nodes, any(node.gpus for node in nodes)
        self._slots = [node.gpus if self._scarce else _share(demand, len(nodes)) for node in nodes]
        self._taken: list[set[int]] = [set() for _ in nodes]

    def left(self, at: int) -> int:
        return self._slots[at] - len(self._taken[at])

    def take(self, at: int, size: int) -> Place | None:
        """The first `size` neighbouring ones; None when there are none."""
        taken = self._taken[at]
        most = self._slots[at] if self._scarce else len(taken) + size
        first = next((d for d in range(most - size + 1) if taken.isdisjoint(range(d, d + size))), None)
        if first is None:
            return None
        taken.update(range(first, first + size))
        return Place(self._nodes[at], first if self._scarce else 0)

    def keep(self, place: Place, size: int) -> None:
        """What is in use already; of a machine that is gone nothing."""
        if place.node in self._nodes:
            at = self._nodes.index(place.node)
            first = place.device if self._scarce else len(self._taken[at])
            self._taken[at].update(range(first, first + size))


def _share(demand: Demand, count: int) -> int:
    """Of each of `count` machines without GPUs, in whole tensor-parallel groups; engines may exceed it."""
    engines = sum(demand.engines.values())
    total = max(demand.ranks, engines) if demand.colocated else demand.ranks + engines
    return -(-total // (count * demand.tp)) * demand.tp


def _too_few(demand: Demand, nodes: Sequence[Node], what: str) -> UsageError:
    found = ", ".join(f"{node.host}: {node.gpus}" for node in nodes)
    engines = ", ".join(sorted({str(size) for size in demand.engines.values()})) or "none"
    shared = "on the same GPUs" if demand.colocated else "on others"
    return UsageError(
        f"no machine has room for {what}: {demand.ranks} learner ranks, {demand.tp} at a time on one machine "
        f"(learner.parallel.tp), and {len(demand.engines)} engines of {engines} GPUs {shared} need more than the GPUs "
        f"that there are ({found}): ask for more machines (cluster.nodes), fewer ranks or fewer or smaller engines")

"""How fast nodes exchange data: two at a time, every two once, and then all together."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Mapping
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Backend

from launcher.preflight.facts import AllReduce, Pair, from_json, to_json
from launcher.preflight.meeting import GRACE_S, Meeting
from launcher.preflight.tournament import better, rounds, suspects

FIRST_BYTES = 1 << 20
MOST_BYTES = {"gloo": 32 << 20, "nccl": 512 << 20}
MEASURED_S = 0.1
"""How long one exchange is meant to take: its size follows from the first one, of FIRST_BYTES."""
REPEATS = 3
"""The best counts: what else a node does makes it slower, nothing makes it faster."""
PAIR_S = 15.0
"""After which an exchange has failed, though it may have been left more."""
FAILURES = 2
"""After so many failures and no success a node is left out of further exchanges."""

Join = Callable[[dist.Store, int, int, int, float], Backend]
"""(store, rank, size, device, deadline in seconds) → a group for collectives."""


def gloo_over(address: str) -> Join:
    """Groups that connect through the interface with this address."""

    def join(store: dist.Store, rank: int, size: int, device: int, deadline_s: float) -> Backend:
        options = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
        options._timeout = timedelta(seconds=deadline_s)
        return dist.ProcessGroupGloo(store, rank, size, options)

    return join


def nccl_over(interface: str) -> Join:
    """Groups whose members find each other through this interface, unless the environment names one."""

    def join(store: dist.Store, rank: int, size: int, device: int, deadline_s: float) -> Backend:
        # Without the second, torch ends the process when a collective outlasts its deadline.
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")
        os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
        torch.cuda.set_device(device)
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=deadline_s)
        return dist.ProcessGroupNCCL(store, rank, size, options)

    return join


def bus_bandwidth(group: Backend, device: torch.device, most_bytes: int) -> float:
    """10⁹ bytes per second of an all-reduce, of which each node sends and receives 2(n−1)/n of its size.
    ArithmeticError when the sum is wrong."""
    size = group.size()
    seconds = torch.tensor([min(_all_reduce_seconds(group, device, FIRST_BYTES) for _ in range(2))], device=device)
    group.allreduce([seconds]).wait()
    fitting = int(FIRST_BYTES * MEASURED_S * size / max(seconds.item(), 1e-9))
    nbytes = max(FIRST_BYTES, min(most_bytes, fitting))
    best = min(_all_reduce_seconds(group, device, nbytes) for _ in range(REPEATS))
    return 2 * (size - 1) / size * nbytes / best / 1e9


def _all_reduce_seconds(group: Backend, device: torch.device, nbytes: int) -> float:
    values = torch.full((nbytes // 4,), group.rank() + 1.0, device=device)
    _settle(group, device)
    began = time.perf_counter()
    group.allreduce([values]).wait()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - began
    wanted = group.size() * (group.size() + 1) / 2
    if not bool((values == wanted).all()):
        raise ArithmeticError(f"a sum of {nbytes} bytes came out wrong: {values.min().item()} to {values.max().item()} "
                              f"instead of {wanted}")
    return seconds


def _settle(group: Backend, device: torch.device) -> None:
    """All begin at the same time."""
    group.allreduce([torch.zeros(1, device=device)]).wait()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measured_pairs(meeting: Meeting, members: Collection[int], backend: str, devices: int, join: Join
                   ) -> tuple[list[Pair], dict[int, str]]:
    """(pairs, node → what it did not answer), at node 0; elsewhere nothing. Nodes that seem slow are measured twice.

    devices: GPUs of each node, of which every round uses another one, so that every adapter gets its turn; 1 on CPUs.
    """
    tournament = _Tournament(meeting, set(members), backend, devices, join)
    schedule = rounds(sorted(members))
    tournament.play("first", schedule)
    if meeting.rank == 0:
        meeting.announce("suspects", to_json(sorted(suspects(tournament.pairs))))
    again = set(from_json(list[int], meeting.awaited("suspects", GRACE_S + tournament.limit_s)))
    tournament.play("second", [[pair for pair in one if again & set(pair)] for one in schedule if again])
    return better(tournament.pairs), tournament.lost


class _Tournament:
    """pairs, lost: what node 0 knows after each round; it says who is out of the next one."""

    def __init__(self, meeting: Meeting, members: set[int], backend: str, devices: int, join: Join):
        self.pairs: list[Pair] = []
        self.lost: dict[int, str] = {}
        self.limit_s = min(PAIR_S, meeting.place.deadline_s)
        self._meeting, self._members, self._backend = meeting, members, backend
        self._devices, self._join = devices, join
        self._end = time.monotonic() + 2 * meeting.place.deadline_s
        self._out: set[int] = set()

    def play(self, name: str, schedule: list[list[tuple[int, int]]]) -> None:
        """Until all are out, as they are when it has taken too long."""
        for index, pairs in enumerate(schedule):
            if self._members <= self._out:
                return
            topic, device = f"{name} round {index}", index % self._devices
            playing = [pair for pair in pairs if not set(pair) & self._out]
            mine = next((pair for pair in playing if self._meeting.rank in pair), None)
            self._meeting.put(topic, to_json(self._meet(topic, mine, device) if mine else None))
            if self._meeting.rank == 0:
                self._collect(topic, playing, device)
            out = self._meeting.awaited(f"{topic} out", 3 * self.limit_s + 2 * GRACE_S)
            self._out = set(from_json(list[int], out))

    def _collect(self, topic: str, playing: list[tuple[int, int]], device: int) -> None:
        present = self._members - self.lost.keys()
        said = {rank: from_json(Pair | None, text)
                for rank, text in self._meeting.gather(topic, present, 2 * self.limit_s + GRACE_S).items()}
        self.lost |= {rank: f"the {topic} of exchanges" for rank in present - said.keys()}
        self.pairs += [_agreed(pair, said, device) for pair in playing]
        out = self._members if time.monotonic() > self._end else self.lost.keys() | _hopeless(self.pairs)
        self._meeting.announce(f"{topic} out", to_json(sorted(out)))

    def _meet(self, topic: str, pair: tuple[int, int], device: int) -> Pair:
        first, second = pair
        try:
            store = dist.PrefixStore(f"{topic}/{first}-{second}", self._meeting.store)
            group = self._join(store, pair.index(self._meeting.rank), 2, device, self.limit_s)
            return Pair(first, second, device, _measured(group, self._backend, device))
        except (RuntimeError, ArithmeticError) as error:
            return Pair(first, second, device, None, _first_line(error))


def _agreed(pair: tuple[int, int], said: Mapping[int, Pair | None], device: int) -> Pair:
    """What both of a pair say: the slower one is right, and it failed if it did for either, or either is gone."""
    both = [one for one in map(said.get, pair) if one is not None]
    errors = [one.error for one in both if one.gb_s is None] + ["no answer"] * (2 - len(both))
    if errors:
        return Pair(*pair, device, None, errors[0])
    return Pair(*pair, device, min(one.gb_s for one in both if one.gb_s is not None))


def _hopeless(pairs: Collection[Pair]) -> set[int]:
    """Nodes whose exchanges have all failed, more than once."""
    outcomes: dict[int, list[bool]] = {}
    for pair in pairs:
        for rank in (pair.first, pair.second):
            outcomes.setdefault(rank, []).append(pair.gb_s is not None)
    return {rank for rank, all_of in outcomes.items() if len(all_of) >= FAILURES and not any(all_of)}


def all_reduce(meeting: Meeting, members: Collection[int], backend: str, join: Join) -> AllReduce:
    """Over all `members`, as this node sees it."""
    ranks, limit = sorted(members), meeting.place.deadline_s / 2
    try:
        group = join(dist.PrefixStore("all", meeting.store), ranks.index(meeting.rank), len(ranks), 0, limit)
        return AllReduce(meeting.rank, _measured(group, backend, 0))
    except (RuntimeError, ArithmeticError) as error:
        return AllReduce(meeting.rank, None, _first_line(error))


def _measured(group: Backend, backend: str, index: int) -> float:
    """Its bandwidth, after which the group is left: NCCL keeps threads and device memory for each."""
    try:
        device = torch.device("cuda", index) if backend == "nccl" else torch.device("cpu")
        return bus_bandwidth(group, device, MOST_BYTES[backend])
    finally:
        group.shutdown()


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__

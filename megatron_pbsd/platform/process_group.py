"""A torch.distributed group of processes that have nothing else in common: a learner rank, and engines' ranks.

SGLang joins such groups by /init_weights_update_group. Who is in a group and what it is called must be put into its
store in the same way on all sides, which torch has only this function for.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d


@dataclass(frozen=True)
class GroupPlace:
    """What a process needs to know to join. name: new for each group. host, port: where rank 0 listens. size: of
    processes. deadline_s: for members to come, and for each of its collectives."""

    name: str
    host: str
    port: int
    size: int
    backend: str
    deadline_s: float


class WeightsGroup:
    """This process's membership, as `rank`, until `close`. Comes back when all members have joined."""

    def __init__(self, place: GroupPlace, rank: int):
        timeout = timedelta(seconds=place.deadline_s)
        store = dist.TCPStore(place.host, place.port, place.size, rank == 0, timeout)
        self._group, _ = distributed_c10d._new_process_group_helper(
            place.size, rank, [], dist.Backend(place.backend), dist.PrefixStore(place.name, store),
            group_name=place.name, timeout=timeout)
        distributed_c10d._world.pg_group_ranks[self._group] = {i: i for i in range(place.size)}
        self._store = store

    def broadcast(self, flat: torch.Tensor) -> dist.Work:
        """From rank 0 to all; to be waited for."""
        return dist.broadcast(flat, src=0, group=self._group, async_op=True)

    def send(self, flat: torch.Tensor, rank: int) -> dist.Work:
        """To one of the others; to be waited for."""
        return dist.isend(flat, rank, group=self._group)

    def close(self) -> None:
        dist.destroy_process_group(self._group)

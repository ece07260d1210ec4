"""Where the nodes tell each other things: a store on node 0. Every wait has a deadline and says who did not answer."""

from __future__ import annotations

import socket
import time
from collections.abc import Collection
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from megatron_pbsd.errors import PbsdError

RETRY_S = 0.1
GRACE_S = 5.0
"""What a wait for node 0 is longer than what node 0 itself waits for others."""


class PreflightError(PbsdError):
    """The preflight could not go on."""

    component = "preflight"


@dataclass(frozen=True)
class Place:
    """Where nodes meet. rank: this node's, of `size`. host, port: where node 0 listens. names: of the nodes by rank, if
    they are known before they come. deadline_s: of each thing that is waited for."""

    rank: int
    size: int
    host: str
    port: int
    names: tuple[str, ...] = ()
    deadline_s: float = 60.0

    def called(self, rank: int) -> str:
        return f"node {rank} ({self.names[rank]})" if self.names else f"node {rank}"


class Meeting:
    """This node's end of the store, which is node 0's until `close`. PreflightError when node 0 does not answer."""

    def __init__(self, place: Place):
        self.place, self.rank = place, place.rank
        wait = timedelta(seconds=place.deadline_s)
        if place.rank:
            self._reach_node_0()
        try:
            self.store = dist.TCPStore(place.host, place.port, None, place.rank == 0, wait, wait_for_workers=False)
        except RuntimeError as error:
            doing = "listen" if place.rank == 0 else f"talk to {place.called(0)}"
            raise PreflightError(f"node {place.rank} cannot {doing} at {place.host}:{place.port}: {_short(error)}; is "
                                 "the port another program's? Choose another one with --rendezvous") from error

    def put(self, topic: str, value: bytes) -> None:
        """What this node has to say on a topic."""
        self.announce(f"{topic}/{self.rank}", value)

    def announce(self, topic: str, value: bytes) -> None:
        """What one node says for all."""
        try:
            self.store.set(topic, value)
        except RuntimeError as error:
            raise self._lost(topic) from error

    def gather(self, topic: str, ranks: Collection[int], deadline_s: float) -> dict[int, bytes]:
        """What nodes said on a topic; without those that had not when the deadline came."""
        end = time.monotonic() + deadline_s
        found = {rank: self.heard(f"{topic}/{rank}", max(0.0, end - time.monotonic())) for rank in sorted(ranks)}
        return {rank: value for rank, value in found.items() if value is not None}

    def heard(self, topic: str, deadline_s: float) -> bytes | None:
        """What was announced; None when it was not within the deadline."""
        try:
            if deadline_s > 0:
                self.store.wait([topic], timedelta(seconds=max(deadline_s, 0.001)))
            elif not self.store.check([topic]):
                return None
            return self.store.get(topic)
        except dist.DistStoreError:
            return None
        except RuntimeError as error:
            raise self._lost(topic) from error

    def awaited(self, topic: str, deadline_s: float) -> bytes:
        """What node 0 announces."""
        if (value := self.heard(topic, deadline_s)) is None:
            raise self._lost(topic, f" within {deadline_s:g} s")
        return value

    def close(self, ranks: Collection[int]) -> None:
        """Node 0 after all others of `ranks`: the store ends with it."""
        self.put("bye", b"")
        if self.rank == 0:
            self.gather("bye", ranks, GRACE_S)

    def _reach_node_0(self) -> None:
        """torch's own way of waiting for a store that is not there yet prints a page for every attempt."""
        place, end, why = self.place, time.monotonic() + self.place.deadline_s, "no attempt"
        while time.monotonic() < end:
            try:
                socket.create_connection((place.host, place.port), max(RETRY_S, end - time.monotonic())).close()
                return
            except OSError as error:
                why = str(error)
                time.sleep(RETRY_S)
        raise PreflightError(
            f"node {place.rank} did not reach {place.called(0)} at {place.host}:{place.port} within "
            f"{place.deadline_s:g} s ({why}): was the command started there, does a firewall close the port, is "
            f"{place.host} an address that this node can reach?")

    def _lost(self, topic: str, how: str = "") -> PreflightError:
        return PreflightError(f"{self.place.called(0)} at {self.place.host}:{self.place.port}, which brings the nodes "
                              f"together, did not answer{how} on {topic!r}: its own output says why")


def _short(error: Exception) -> str:
    return str(error).splitlines()[0][:200]

"""Bringing a thread out of a collective that will not end."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import closing, suppress

import torch.distributed as dist


class Connections:
    """The connections that process groups make while this is open, to be broken off from another thread.

    NCCL has an abort of its own. Gloo's does nothing (torch 2.13: `ProcessGroup.abort` and `shutdown` return and the
    collective goes on waiting), and a timeout set later does not reach point-to-point receives; but it takes a
    connection that is shut down for a dead peer, and raises at once. Linux only: sockets are found in /proc.
    """

    def __init__(self):
        self._before = _sockets().keys()
        self._made: set[str] | None = None

    def close(self) -> None:
        """What is connected from here on is left alone."""
        self._made = _sockets().keys() - self._before

    def break_off(self, spared: int) -> None:
        """Collectives in flight and later ones raise, here and at the peers; the groups are unusable from then on.

        spared:  a local port whose connections are none of these.
        """
        if dist.is_initialized() and dist.get_backend() == "nccl":
            dist.distributed_c10d._abort_process_group()
            return
        open_now = _sockets()
        for name in open_now.keys() - self._before if self._made is None else open_now.keys() & self._made:
            _shut_down(open_now[name], spared)


def _shut_down(descriptor: int, spared: int) -> None:
    # The process may close any of them meanwhile.
    with suppress(OSError), closing(socket.socket(fileno=os.dup(descriptor))) as connection:
        if connection.family in (socket.AF_INET, socket.AF_INET6) and connection.getsockname()[1] != spared:
            connection.getpeername()  # OSError when it only listens
            connection.shutdown(socket.SHUT_RDWR)


def _sockets() -> dict[str, int]:
    """'socket:[inode]' → descriptor, of this process. Descriptors are used again, inodes not while they are open."""
    return {name: number for name, number in _descriptors() if name.startswith("socket:")}


def _descriptors() -> Iterator[tuple[str, int]]:
    for number in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            yield os.readlink(f"/proc/self/fd/{number}"), int(number)

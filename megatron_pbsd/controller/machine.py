"""What has to be done on the machine that a component runs on."""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from contextlib import suppress
from pathlib import Path

import psutil

from megatron_pbsd.ports import free_port
from megatron_pbsd.resharding.shared_folder import SharedFolder

LOG_LINES_SHOWN = 20
STACKS_WAIT_S = 2.0


class Here:
    """This machine, as a `runtime.Machine`, and what others ask to have done here. Owns a folder until `close`."""

    device = None

    def __init__(self, address: str = "127.0.0.1"):
        self.name, self.address = socket.gethostname(), address
        self._folder: SharedFolder | None = None

    def free_port(self) -> int:
        return free_port()

    def memory_folder(self) -> str:
        if self._folder is None:
            self._folder = SharedFolder()
        return self._folder.path

    def network(self) -> dict[str, str]:
        """Environment variables by which gloo and NCCL take the interface that has this machine's address."""
        # All of 127.0.0.0/8 is the loopback's, which lists one of them.
        mine = "127.0.0.1" if self.address.startswith("127.") else self.address
        for interface, addresses in psutil.net_if_addrs().items():
            if any(found.address == mine for found in addresses):
                return {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface}
        return {}

    def kill(self, pid: int) -> None:
        """A process that is stopped too."""
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    def stack(self, pid: int, log: str) -> str:
        """Where process `pid` is, which writes that to its log when it is sent SIGUSR1."""
        path = Path(log)
        try:
            before = path.stat().st_size
            os.kill(pid, signal.SIGUSR1)
        except (FileNotFoundError, ProcessLookupError):
            return "(the process has not started or is gone)"
        end, size = time.monotonic() + STACKS_WAIT_S, before
        while time.monotonic() < end:
            time.sleep(0.05)
            previous, size = size, path.stat().st_size
            if size == previous > before:
                break
        with path.open("rb") as file:
            file.seek(before)
            stacks = file.read().decode(errors="replace").rstrip()
        return stacks or "(the process does not react to signals: is it stopped?)"

    def last_lines(self, log: str, count: int = LOG_LINES_SHOWN) -> list[str]:
        """The last lines of a component's log, without the markers that Ray prints for its own log reader."""
        try:
            lines = Path(log).read_text(errors="replace").splitlines()
        except FileNotFoundError:
            return []
        return [line for line in lines if not re.match(r":(actor_name|job_id|task_name):", line)][-count:]

    def close(self) -> None:
        if self._folder is not None:
            self._folder.close()
            self._folder = None

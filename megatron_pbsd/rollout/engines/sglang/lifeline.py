"""What holds the parts of a server on several machines together: a connection from each further machine to the engine.

It is what a pipe is on one machine (`keeper.py`). Whoever finds the other end closed ends what it has, however that end
was closed: by a component that ended its processes, by one that was killed, or by the kernel, which finds out within
`SILENCE_S` that a machine is gone.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any

from megatron_pbsd.ports import free_port
from megatron_pbsd.rollout.engines.protocol import EngineError

SILENCE_S, PROBES = 20, 4
AGAIN_S = 0.2
LET_GO_S = 10.0
"""For a part to end its processes, once it has been let go of."""


@dataclass(frozen=True)
class Meeting:
    """Where an engine waits for its server's parts on further machines. machines: of the server, the engine's too."""

    host: str
    port: int
    machines: int


@dataclass(frozen=True)
class LastWords:
    """Of a part that has ended. lines: the end of its log."""

    name: str
    cause: str
    lines: tuple[str, ...] = ()


class Lifeline:
    """A part's end."""

    def __init__(self, name: str, meeting: Meeting, deadline_s: float):
        """EngineError when the engine is not there by then."""
        end = time.monotonic() + deadline_s
        while True:
            try:
                self._socket = socket.create_connection((meeting.host, meeting.port), deadline_s)
                break
            except OSError as error:
                if time.monotonic() > end:
                    raise EngineError(f"{name}: nobody waits for it at {meeting.host}:{meeting.port}: "
                                      f"{error}") from error
                time.sleep(AGAIN_S)
        keep_alive(self._socket)
        self._lines = self._socket.makefile("r", encoding="utf-8")
        self._send({"name": name})

    def order(self) -> dict[str, Any] | None:
        """What the engine's server was started with; None when the engine has gone before."""
        try:
            line = self._lines.readline()
        except OSError:
            return None
        self._socket.settimeout(None)
        return json.loads(line) if line else None

    def fileno(self) -> int:
        """Readable once the engine has let go."""
        return self._socket.fileno()

    def say(self, words: LastWords) -> None:
        with suppress(OSError):  # when the engine has gone too
            self._send({"cause": words.cause, "lines": words.lines})

    def _send(self, message: Mapping[str, Any]) -> None:
        self._socket.sendall(json.dumps(message).encode() + b"\n")

    def close(self) -> None:
        self._lines.close()
        self._socket.close()


class Parts:
    """The engine's ends, from construction, which waits for all parts to come, to `end`."""

    def __init__(self, meeting: Meeting, deadline_s: float):
        """EngineError when they have not come by then."""
        self._meeting, self._ends = meeting, {}
        end = time.monotonic() + deadline_s
        with socket.create_server((meeting.host, meeting.port)) as listener:
            while len(self._ends) < meeting.machines - 1:
                try:
                    listener.settimeout(max(0.1, end - time.monotonic()))
                    connection, _ = listener.accept()
                    keep_alive(connection)
                    connection.settimeout(LET_GO_S)
                    self._ends[json.loads(read_line(connection))["name"]] = connection
                except (OSError, ValueError) as error:
                    if time.monotonic() > end:
                        self.end(0.0)
                        raise EngineError(
                            f"of the server's {meeting.machines} machines {len(self._ends) + 1} have come within "
                            f"rollout.sglang.start_deadline_s = {deadline_s:g}: {sorted(self._ends)}") from error

    def start(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Tell all to start, with these and what they have in common; what to start the engine's own part with."""
        common = {**arguments, "nnodes": self._meeting.machines,
                  "dist_init_addr": f"{self._meeting.host}:{free_port()}"}
        for connection in self._ends.values():
            connection.sendall(json.dumps(common).encode() + b"\n")
        return common | {"node_rank": 0}

    def watch(self, fallen: Callable[[], None]) -> None:
        """fallen: called from another thread when one of them has ended."""
        connections = list(self._ends.values())

        def watch() -> None:
            wait(connections)
            fallen()

        threading.Thread(target=watch, daemon=True).start()

    def end(self, patience_s: float) -> list[LastWords]:
        """All of them, once one has ended by itself or that long after; what those say that have ended by themselves.
        When this returns, all that can be reached are gone."""
        ends, self._ends = self._ends, {}
        fallen = wait(list(ends.values()), patience_s)
        words = []
        for connection in ends.values():
            with suppress(OSError):  # when it is closed already
                connection.shutdown(socket.SHUT_WR)
        for name, connection in ends.items():
            try:
                line = read_line(connection)
            except OSError:
                line = ""
            if line:
                said = json.loads(line)
                words.append(LastWords(name, said["cause"], tuple(said["lines"])))
            elif connection in fallen:
                words.append(LastWords(name, "it, or its machine, is gone"))
            connection.close()
        return words


def read_line(connection: socket.socket) -> str:
    """Up to the end of a line, or all that comes."""
    with connection.makefile("r", encoding="utf-8") as lines:
        return lines.readline()


def keep_alive(connection: socket.socket) -> None:
    """Who is gone without a word is missed."""
    each = SILENCE_S // PROBES
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in ((socket.TCP_KEEPIDLE, each), (socket.TCP_KEEPINTVL, each), (socket.TCP_KEEPCNT, PROBES - 1)):
        connection.setsockopt(socket.IPPROTO_TCP, option, value)

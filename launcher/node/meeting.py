"""The machines of an attempt meet at the head, over TCP, and watch each other until it ends.

    attempts/<n>/head.json      where the head is to be found, and a secret by which the machines know each other
    attempts/<n>/node-<rank>    a canary: what a machine writes there the head has to see, or they share no folder

Each says every `BEAT_S` that it is there; who has not been heard from for `SILENCE_S` is taken for gone, be it a
machine, its network or its process.
"""

from __future__ import annotations

import json
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launcher.node.member import Member
from megatron_pbsd.errors import PbsdError
from megatron_pbsd.observability.records import write_atomically

HEAD = "head.json"
BEAT_S, SILENCE_S = 2.0, 25.0
LOOK_S = 0.3
CANARY_S = 15.0
"""In which a file has to be seen by other machines: network file systems remember for seconds what is not there."""


class NodeError(PbsdError):
    """A machine of the run failed, or did not come."""

    component = "node"


@dataclass(frozen=True)
class Head:
    """address, port: of its meeting. secret: known to whoever can read the run's folder; Ray's token too."""

    address: str
    port: int
    secret: str
    job: str
    attempt: int

    def write(self, folder: Path) -> None:
        path = folder / HEAD
        path.touch(mode=0o600)
        write_atomically(path, [json.dumps(asdict(self))])
        path.chmod(0o600)


class Line:
    """Messages, one JSON object a line, over one connection; beats are its own."""

    def __init__(self, connection: socket.socket):
        connection.settimeout(SILENCE_S)
        self._connection, self._sending = connection, threading.Lock()
        self._file = connection.makefile("r", encoding="utf-8")
        self._closed = threading.Event()

    def send(self, **message: Any) -> None:
        """To one who has gone it is not sent."""
        with suppress(OSError), self._sending:
            self._connection.sendall((json.dumps(message) + "\n").encode())

    def beat(self) -> None:
        """Begin to say that this side is there."""
        def run() -> None:
            while not self._closed.wait(BEAT_S):
                self.send(beat=1)

        threading.Thread(target=run, name="beat", daemon=True).start()

    def messages(self) -> Iterator[dict[str, Any]]:
        """All that are no beats, until the other side is gone or silent."""
        with suppress(OSError, ValueError):
            for line in self._file:
                message = json.loads(line)
                if "beat" not in message:
                    yield message

    def close(self) -> None:
        self._closed.set()
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()


class Meeting:
    """The head's side. What comes is (rank, message), with None for a message when the member is gone."""

    def __init__(self, member: Member, address: str, port: int, secret: str, folder: Path):
        self._member, self._secret, self._folder = member, secret, folder
        self._lines: dict[int, Line] = {}
        self.names: dict[int, str] = {0: socket.gethostname()}
        self._events: queue.Queue[tuple[int, dict[str, Any] | None]] = queue.Queue()
        self._listener = socket.create_server((address, port), backlog=1024)
        threading.Thread(target=self._accept, name="meeting", daemon=True).start()

    def name(self, rank: int) -> str:
        return self.names.get(rank) or self._member.name_of(rank)

    def tell(self, rank: int, **message: Any) -> None:
        self._lines[rank].send(**message)

    def tell_all(self, **message: Any) -> None:
        for rank in list(self._lines):
            self.tell(rank, **message)

    def heard(self, wait_s: float) -> Iterator[tuple[int, dict[str, Any] | None]]:
        """What the members have said, the first of it waited for."""
        with suppress(queue.Empty):
            yield self._events.get(timeout=wait_s)
            while True:
                yield self._events.get_nowait()

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for line in self._lines.values():
            line.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(Line(connection),), daemon=True).start()

    def _serve(self, line: Line) -> None:
        messages = line.messages()
        hello = next(messages, {})
        if hello.get("secret") != self._secret:
            line.close()
            return
        rank = hello["rank"]
        self._lines[rank], self.names[rank] = line, hello["host"]
        line.send(welcome=True)
        line.beat()
        if _appears(self._folder / f"node-{rank}"):
            self._events.put((rank, {"here": True}))
        else:
            self._events.put((rank, {"failed": f"what it writes to {self._folder.resolve()} is not seen by the head "
                                              f"within {CANARY_S:g} s: the run's folder has to be on a file system "
                                              "that all nodes share"}))
        for message in messages:
            self._events.put((rank, message))
        self._events.put((rank, None))


def find_head(attempts: Path, member: Member, deadline_s: float) -> tuple[Head, Line]:
    """The head of the newest attempt, as soon as it answers. NodeError when none does in time."""
    end = time.monotonic() + deadline_s
    problem = f"{attempts}/<n>/{HEAD} does not appear: is {attempts.resolve()} on a file system that all nodes share?"
    while time.monotonic() < end:
        for head in _heads(attempts):
            if member.job and head.job != member.job:
                continue
            try:
                line = Line(socket.create_connection((head.address, head.port), 5.0))
            except OSError as error:
                problem = f"nobody answers at {head.address}:{head.port}, where it was: {error.strerror or error}"
                continue
            (attempts / str(head.attempt) / f"node-{member.rank}").write_text(socket.gethostname())
            line.send(secret=head.secret, rank=member.rank, host=socket.gethostname())
            if next(line.messages(), None) is not None:
                line.beat()
                return head, line
            problem = f"{head.address}:{head.port}, where it was, has hung up: is that another one by now?"
        time.sleep(LOOK_S)
    raise NodeError(f"{socket.gethostname()} did not find the head, {member.name_of(0)}, within {deadline_s:g} s: "
                    f"{problem}")


def _heads(attempts: Path) -> list[Head]:
    """Newest first."""
    found = []
    for path in attempts.glob(f"*/{HEAD}"):
        with suppress(OSError, ValueError, TypeError):
            found.append(Head(**json.loads(path.read_text(encoding="utf-8"))))
    return sorted(found, key=lambda head: -head.attempt)


def _appears(path: Path, seconds: float = CANARY_S) -> bool:
    return wait_until(path.exists, seconds)


def wait_until(holds: Callable[[], bool], seconds: float) -> bool:
    """Whether it does in time."""
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(LOOK_S)
    return True

"""`pbsd node RUN`: what runs on every machine of a run. They make one Ray cluster, in which the first one trains.

All of them end together: with the driver's exit code, or because one of them, its network or its Ray is gone.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import yaml

from launcher.node.attempt import ATTEMPTS, NUMBER, Attempt
from launcher.node.meeting import SILENCE_S, Head, Line, Meeting, NodeError, find_head
from launcher.node.member import Member, head_address, own_address, port_block, without_foreign
from launcher.node.orphans import MARK, end_orphans, mark
from launcher.node.processes import end, exit_code, start
from launcher.node.ray_server import RayServer, command
from launcher.slurm.fewer import overrides_for
from launcher.slurm.records import submitted_config
from megatron_pbsd.config import RunConfig
from megatron_pbsd.observability.records import run_folder
from megatron_pbsd.ports import is_free
from megatron_pbsd.stopping import STOP

POLL_S = 0.3
TERMINATED, FAILED = 143, 1
DRIVER_GRACE_S = 20.0
"""For the driver to unwind when it is asked to end; schedulers kill after 30."""


class Signals:
    """USR1 asks the run to end after its step. TERM asks all to end now."""

    def __init__(self, run: Path):
        self._run, self.terminated = run, False

    @contextmanager
    def listening(self) -> Iterator[Signals]:
        handlers = {signal.SIGUSR1: self._stop, signal.SIGTERM: self._terminate}
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self, *_: object) -> None:
        # Not the signal itself: a driver that is just being started would die of it.
        (self._run / STOP).touch()

    def _terminate(self, *_: object) -> None:
        self.terminated = True


def run_node(folder: str, member: Member, gpus: int, deadline_s: float) -> int:
    """Take part in an attempt at the run in `folder` until it has ended; the exit code. gpus: of this machine.

    deadline_s: for all machines to come. NodeError when one fails or does not come.
    """
    run = run_folder(folder)
    with Signals(run).listening() as signals:
        if member.rank == 0:
            return Leader(run, member, gpus, deadline_s, signals).lead()
        return follow(run, member, gpus, deadline_s, signals)


class Leader:
    """The first machine: it has the head of Ray, and the driver."""

    def __init__(self, run: Path, member: Member, gpus: int, deadline_s: float, signals: Signals):
        self._run, self._member, self._gpus, self._deadline_s = run, member, gpus, deadline_s
        self._signals = signals
        self._secret = secrets.token_hex(16) if member.count > 1 else ""
        self._meeting: Meeting | None = None
        self._ray: RayServer | None = None
        self._up: set[int] = set()

    def lead(self) -> int:
        """The driver's exit code. NodeError when a machine fails or is missing."""
        if NUMBER not in os.environ:
            # Who asked an earlier attempt to stop; a job script sees to that itself.
            (self._run / STOP).unlink(missing_ok=True)
        names = self._member.hosts if len(self._member.hosts) == self._member.count else (socket.gethostname(),)
        attempt = Attempt(self._run, os.environ, names)
        _say_of_orphans(end_orphans(self._run, attempt.number))
        environ = environment(os.environ, self._run, attempt.number, self._secret)
        with ExitStack() as stack:
            try:
                address = self._assemble(attempt, environ, stack) if self._member.count > 1 else None
                code = TERMINATED if self._signals.terminated else self._drive(attempt, environ, address)
            except BaseException as error:
                attempt.ended(FAILED, str(error) or type(error).__name__)
                self._tell_all(exit=FAILED)
                raise
            attempt.ended(code)
            self._tell_all(exit=code)
        return code

    def _assemble(self, attempt: Attempt, environ: Mapping[str, str], stack: ExitStack) -> str:
        """Meet the others, and make a Ray cluster with them; its address."""
        address = head_address(self._member)
        ports = port_block(self._member.job, 0, is_free)
        self._meeting = Meeting(self._member, address, ports[-1], self._secret, attempt.folder)
        stack.callback(self._meeting.close)
        Head(address, ports[-1], self._secret, self._member.job, attempt.number).write(attempt.folder)
        folder = ray_folder()
        ends = time.monotonic() + self._deadline_s
        self._ray = RayServer(command(address, ports, self._gpus, folder, None), environ,
                              attempt.folder / "ray-0.log", folder)
        stack.callback(self._ray.close)
        self._ray.wait(self._deadline_s)
        joined = f"{address}:{ports[0]}"
        here: set[int] = set()
        while len(self._up) < self._member.count - 1 and not self._signals.terminated:
            for rank in self._news() - here:
                self._meeting.tell(rank, ray=joined)
                here.add(rank)
            self._check(attempt)
            if time.monotonic() > ends:
                raise NodeError(self._late(here))
        attempt.training([self._meeting.name(rank) for rank in range(self._member.count)])
        return joined

    def _late(self, here: set[int]) -> str:
        others = range(1, self._member.count)
        silent = [self._meeting.name(rank) for rank in others if rank not in here]
        slow = [self._meeting.name(rank) for rank in others if rank in here - self._up]
        said = [f"not heard from: {', '.join(silent)}"] if silent else []
        said += [f"Ray is not up on: {', '.join(slow)}"] if slow else []
        return (f"{len(self._up) + 1} of {self._member.count} nodes came together within {self._deadline_s:g} s; "
                + "; ".join(said))

    def _drive(self, attempt: Attempt, environ: Mapping[str, str], address: str | None) -> int:
        """Run the driver to its end; its exit code."""
        line = driver_command(self._run, address, self._member.count)
        driver = start(line, environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        copying = threading.Thread(target=_copy, args=(driver, attempt.folder / "driver.log"), daemon=True)
        copying.start()
        try:
            while driver.poll() is None:
                self._news()
                self._check(attempt)
                if self._signals.terminated:
                    return end(driver, DRIVER_GRACE_S)
            copying.join(POLL_S)
            return exit_code(driver.returncode)
        finally:
            end(driver, DRIVER_GRACE_S)

    def _news(self) -> set[int]:
        """What the others say, waited for a moment: ranks that have come. NodeError when one has failed or gone."""
        if self._meeting is None:
            time.sleep(POLL_S)
            return set()
        came: set[int] = set()
        for rank, message in self._meeting.heard(POLL_S):
            name = self._meeting.name(rank)
            if message is None:
                raise NodeError(f"{name} is gone, or was not heard from for {SILENCE_S:g} s")
            if "failed" in message:
                raise NodeError(f"{name}: {message['failed']}")
            if "terminated" in message:
                self._signals.terminated = True
            if "here" in message:
                came.add(rank)
            if "up" in message:
                self._up.add(rank)
        return came

    def _check(self, attempt: Attempt) -> None:
        if self._ray is not None and self._ray.is_gone():
            raise NodeError(f"Ray has ended on {socket.gethostname()}, the head: {self._ray.last_words()}")
        if attempt.superseded():
            raise NodeError(f"attempt {attempt.number} has been given up: a later one has begun")

    def _tell_all(self, **message: object) -> None:
        if self._meeting is not None:
            self._meeting.tell_all(**message)


def follow(run: Path, member: Member, gpus: int, deadline_s: float, signals: Signals) -> int:
    """Be a worker of the head's Ray until it says that all is over; the exit code that it says."""
    head, line = find_head(run / ATTEMPTS, member, deadline_s)
    folder, told = run / ATTEMPTS / str(head.attempt), Told(line)
    with ExitStack() as stack:
        stack.callback(line.close)
        _say_of_orphans(end_orphans(run, head.attempt))
        joined = told.wait("ray", lambda: _give_up(signals, line), deadline_s)
        if joined is None:
            return told.code(head)
        files = ray_folder()
        environ = environment(os.environ, run, head.attempt, head.secret)
        ports = port_block(head.job, member.rank, is_free)
        ray = RayServer(command(own_address(head.address), ports, gpus, files, joined), environ,
                        folder / f"ray-{member.rank}.log", files)
        stack.callback(ray.close)
        try:
            ray.wait(deadline_s)
        except NodeError as error:
            line.send(failed=str(error))
            raise
        line.send(up=True)
        told.wait("exit", lambda: _give_up(signals, line) or ray.is_gone())
        # The head's Ray is the first that ends when all does.
        if told.wait("exit", lambda: told.over, 2.0) is None and ray.is_gone():
            line.send(failed=(problem := f"Ray has ended: {ray.last_words()}"))
            raise NodeError(f"{socket.gethostname()}: {problem}")
        return told.code(head)


class Told:
    """What the head has said so far, heard in a thread of its own."""

    def __init__(self, line: Line):
        self._said: dict[str, object] = {}
        self.over = False
        self._line = line
        threading.Thread(target=self._hear, name="head", daemon=True).start()

    def _hear(self) -> None:
        for message in self._line.messages():
            self._said |= message
        self.over = True

    def wait(self, key: str, gives_up: Callable[[], bool], deadline_s: float = float("inf")):
        """What it says of `key`; None when it ends all or goes first, or `gives_up`, or it takes too long."""
        ends = time.monotonic() + deadline_s
        while key not in self._said and "exit" not in self._said and not self.over:
            if gives_up() or time.monotonic() > ends:
                return None
            time.sleep(POLL_S)
        return self._said.get(key)

    def code(self, head: Head) -> int:
        """NodeError when it has gone without a word."""
        if "exit" not in self._said:
            raise NodeError(f"the head, {head.address}, is gone, or was not heard from for {SILENCE_S:g} s")
        return int(self._said["exit"])


def _give_up(signals: Signals, line: Line) -> bool:
    """Never, but the head is told when this machine's part is asked to end: it ends all."""
    if signals.terminated:
        line.send(terminated=True)
        signals.terminated = False
    return False


def environment(environ: Mapping[str, str], run: Path, attempt: int, secret: str) -> dict[str, str]:
    """For Ray and the driver. secret: of a cluster, '' without one."""
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secret} if secret else {}
    return without_foreign(environ) | token | {MARK: mark(run, attempt), "PYTHONUNBUFFERED": "1"}


def driver_command(run: Path, address: str | None, nodes: int) -> list[str]:
    """It goes on from the newest checkpoint, or begins where there is none; smaller on fewer nodes than were meant."""
    where, config = run.resolve(), submitted_config(run)
    fitting = overrides_for(RunConfig.model_validate(yaml.safe_load(config.read_text(encoding="utf-8"))), nodes)
    return [sys.executable, "-m", "launcher.cli", "train", str(config), "--resume=latest", "--runs",
            str(where.parent), "--name", where.name, *(["--ray-address", address] if address else []),
            *(word for key, value in fitting.items() for word in (f"--{key}", str(value)))]


def ray_folder() -> Path:
    """Paths of sockets may have 107 bytes, of which Ray takes about 65."""
    return Path(tempfile.mkdtemp(prefix="pbsd-ray-", dir="/tmp"))


def _copy(driver: subprocess.Popen, log: Path) -> None:
    """What the driver prints, to its log and to our output."""
    with log.open("ab", buffering=0) as file:
        while data := driver.stdout.read1(1 << 16):
            file.write(data)
            with suppress(OSError):  # Nobody reads it any more: the log has it.
                os.write(sys.stdout.fileno(), data)


def _say_of_orphans(ended: list[int]) -> None:
    if ended:
        print(f"pbsd: {socket.gethostname()}: ended {len(ended)} processes of an earlier attempt", file=sys.stderr)

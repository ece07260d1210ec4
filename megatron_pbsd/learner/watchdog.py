"""Names the ranks that keep the others waiting, with their stacks.

Every rank answers, in a thread of its own, whoever asks where it is. A rank that outwaits a phase, or whose collective
breaks off, asks all others. Nothing is exchanged until then: entering a phase and marking progress are local.
"""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Literal, NamedTuple

import torch.distributed as dist

from megatron_pbsd.controller.failures import PeersHung
from megatron_pbsd.learner.connections import Connections
from megatron_pbsd.learner.hang import Answer, Frame, LearnerHung, Report, Silence, Verdict, judge, ranks_text

ANSWER_S = 3.0
"""A live rank answers within milliseconds, on a crowded machine later; one that has not by now cannot run Python."""
STUCK_S = 1.5
"""Python that has not run for this long after a deadline is stuck. Less than `ANSWER_S`: others then read the stack."""
ASKED_AT_A_TIME = 32


class Address(NamedTuple):
    """Where a rank answers. `stacks`: descriptor of the file that `faulthandler` writes to when Python is stuck."""

    host: str
    port: int
    machine: str
    pid: int
    stacks: int

    def encode(self) -> str:
        return "\n".join(map(str, self))

    @staticmethod
    def decode(text: str) -> Address:
        host, port, machine, pid, stacks = text.split("\n")
        return Address(host, int(port), machine, int(pid), int(stacks))

    def __str__(self) -> str:
        return f"process {self.pid} on {self.machine}"


@dataclass
class Phase:
    """One `with watchdog.phase(...)`. `lock` is held while a verdict is sought; `hung` is that verdict's error."""

    name: str
    deadline_s: float
    began: float
    ends: float
    mark: str = ""
    marked: float = 0.0
    state: Literal["inside", "broken off"] = "inside"
    hung: LearnerHung | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


class Watchdog:
    """One rank's. Made by `join` in the thread that runs the phases.

    store:  the ranks' common store, for `init_process_group(store=...)`.
    """

    def __init__(self, rank: int, deadline_s: float, host: str, store: dist.Store, connections: Connections):
        self.rank, self.store, self._deadline_s, self._connections = rank, store, deadline_s, connections
        self._thread = threading.get_ident()
        self._listener = socket.create_server((host, 0), backlog=1024)
        self._stacks = os.memfd_create(f"stacks of rank {rank}")
        self.address = Address(host, self._listener.getsockname()[1], socket.gethostname(), os.getpid(), self._stacks)
        self._addresses: dict[int, Address] = {rank: self.address}
        self._phases: list[Phase] = []
        self._ends: float | None = None
        self._entered, self._last, self._left, self._error = 0, "", time.monotonic(), ""
        self._verdict: Verdict | None = None
        self._changed, self._closed = threading.Condition(), False
        for target in (self._answer, self._watch):
            threading.Thread(target=target, name=f"watchdog {target.__name__[1:]}", daemon=True).start()

    @classmethod
    def join(cls, rank: int, world_size: int, rendezvous: str, deadline_s: float) -> Watchdog:
        """Meet the other ranks at `rendezvous` ('tcp://host:port', where rank 0 listens).

        deadline_s:  for the ranks to arrive, and for phases that do not say otherwise.
        LearnerHung names those that have not arrived in time.
        """
        host, port = rendezvous.removeprefix("tcp://").rsplit(":", 1)
        connections, ends = Connections(), time.monotonic() + deadline_s
        watchdog, missing, cause = None, [0], None
        try:
            # Before anything else takes a port: this one was free a moment ago.
            store = dist.TCPStore(
                host, int(port), world_size, rank == 0, timedelta(seconds=deadline_s), wait_for_workers=False)
            watchdog = cls(rank, deadline_s, _own_address(host, int(port)), store, connections)
            missing = watchdog._meet(world_size, ends)
        except dist.DistError as error:
            # The store is rank 0's.
            if rank == 0:
                raise
            cause = error
        if not missing:
            return watchdog
        if watchdog is not None:
            watchdog.close()
        raise LearnerHung(rank, "join", deadline_s, time.monotonic() - ends + deadline_s, Verdict(
            tuple(missing), f"{ranks_text(missing)} did not arrive at {rendezvous}, or left it")) from cause

    def _meet(self, world_size: int, ends: float) -> list[int]:
        """Learn where the others answer; the ranks that have not come by `ends`."""
        keys = [f"watchdog/{rank}" for rank in range(world_size)]
        self.store.set(keys[self.rank], self.address.encode())
        try:
            self.store.wait(keys, timedelta(seconds=max(0.001, ends - time.monotonic())))
        except dist.DistStoreError:
            return [rank for rank, key in enumerate(keys) if not self.store.check([key])]
        self._addresses = {rank: Address.decode(t.decode()) for rank, t in enumerate(self.store.multi_get(keys))}
        return []

    @contextmanager
    def connecting(self) -> Iterator[None]:
        """Surrounds the making of process groups: phase 'connect'. Their collectives can then be broken off."""
        with self.phase("connect"):
            yield
        self._connections.close()

    @contextmanager
    def phase(self, name: str, deadline_s: float | None = None) -> Iterator[None]:
        """Collectives happen in phases, which all ranks enter alike; phases may enclose others.

        deadline_s:  None for that of the enclosing phase or, without one, `join`'s; it never ends after the enclosing.
        LearnerHung when the phase outlasts its deadline, or one of its collectives fails because of other ranks.
        Errors of this rank itself pass through.
        """
        phase = self._enter(name, deadline_s)
        error = ""
        try:
            yield
        except PeersHung:
            raise
        except Exception as failure:
            self._raise_if_hung(phase, seek=_is_broken_collective(failure), cause=failure)
            error = f"{type(failure).__name__}: {failure}"
            raise
        else:
            self._raise_if_hung(phase)
        finally:
            self._leave(phase, error)

    def mark(self, progress: str) -> None:
        """How far the current phase is, in words: 'micro-batch 3/8'. Costs nothing to speak of."""
        phase = self._phases[-1]
        phase.mark, phase.marked = progress, time.monotonic()

    def close(self) -> None:
        """Stop answering and watching."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        faulthandler.cancel_dump_traceback_later()
        os.close(self._stacks)

    def report(self) -> Report:
        """Where this rank is now."""
        now = time.monotonic()
        phase = next(iter(self._phases[-1:]), None)
        frame = sys._current_frames().get(self._thread)
        calls = traceback.extract_stack(frame) if frame else []
        return Report(
            where=str(self.address), entered=self._entered, phase=phase.name if phase else self._last,
            state=phase.state if phase else "failed" if self._error else "left",
            elapsed_s=now - (phase.began if phase else self._left),
            mark=phase.mark if phase else "", mark_s=now - phase.marked if phase else 0.0, error=self._error,
            stack=tuple(Frame(c.filename, c.lineno or 0, c.name, c.line or "") for c in calls),
            verdict=self._verdict)

    def _enter(self, name: str, deadline_s: float | None) -> Phase:
        now = time.monotonic()
        outer = self._phases[-1] if self._phases else None
        if deadline_s is None:
            deadline_s = outer.deadline_s if outer else self._deadline_s
            ends = outer.ends if outer else now + deadline_s
        else:
            ends = min(now + deadline_s, outer.ends) if outer else now + deadline_s
        phase = Phase(name, deadline_s, now, ends)
        self._entered, self._error = self._entered + 1, ""
        self._change(lambda: self._phases.append(phase))
        return phase

    def _leave(self, phase: Phase, error: str) -> None:
        self._last, self._left, self._error = phase.name, time.monotonic(), error
        self._change(self._phases.pop)

    def _change(self, change: Callable[[], object]) -> None:
        """Enter or leave a phase, and expect the end that is next then."""
        with self._changed:
            change()
            before, self._ends = self._ends, self._phases[-1].ends if self._phases else None
            if self._ends != before:
                self._changed.notify_all()
                self._expect_stacks()

    def _expect_stacks(self) -> None:
        """Have the stacks written some time after the end of the phase, by a thread that needs no interpreter.

        It is the only one left when native code holds the interpreter's lock. Were others running, reading their stacks
        from outside could crash the process: `_watch`, if it runs, cancels it at the end.
        """
        faulthandler.cancel_dump_traceback_later()
        if self._ends is not None:
            faulthandler.dump_traceback_later(max(0.0, self._ends - time.monotonic()) + STUCK_S, file=self._stacks)

    def _raise_if_hung(self, phase: Phase, seek: bool = False, cause: Exception | None = None) -> None:
        """The verdict of the watching thread; with `seek`, one of our own when other ranks are at fault."""
        if seek:
            phase.state = "broken off"
        with phase.lock:
            if phase.hung is None and seek:
                verdict = judge(self.rank, self._ask_all())
                if verdict.behind:
                    phase.hung = self._hung(phase, verdict)
                    # Ranks that wait for this one, and not for the one at fault, learn of it so.
                    self._connections.break_off(spared=self.address.port)
        if phase.hung is not None:
            raise phase.hung from cause

    def _hung(self, phase: Phase, verdict: Verdict) -> LearnerHung:
        self._verdict = verdict
        return LearnerHung(self.rank, phase.name, phase.deadline_s, time.monotonic() - phase.began, verdict)

    def _watch(self) -> None:
        """Wait for a phase to outlast its deadline, say so in the log, and bring the rank out of its collective."""
        while True:
            with self._changed:
                phase = next((p for p in self._phases[-1:] if p.hung is None), None)
                if self._closed:
                    return
                if phase is None or phase.ends > time.monotonic():
                    self._changed.wait(None if phase is None else phase.ends - time.monotonic())
                    continue
                faulthandler.cancel_dump_traceback_later()
            with phase.lock:
                if phase.hung is not None or phase not in self._phases:
                    continue
                phase.hung = self._hung(phase, judge(self.rank, self._ask_all()))
            print(phase.hung, file=sys.stderr, flush=True)
            self._connections.break_off(spared=self.address.port)

    def _answer(self) -> None:
        """Tell whoever connects where this rank is."""
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with closing(connection), suppress(OSError):
                connection.settimeout(ANSWER_S)
                connection.sendall(self.report().encode())

    def _ask_all(self) -> dict[int, Answer]:
        others = [rank for rank in self._addresses if rank != self.rank]
        answers: dict[int, Answer] = {self.rank: self.report()}
        with ThreadPoolExecutor(ASKED_AT_A_TIME) as pool:
            answers |= zip(others, pool.map(lambda rank: ask(self._addresses[rank]), others), strict=True)
        return answers


def ask(address: Address) -> Answer:
    """Where the rank at `address` is, from itself or, as far as possible, from outside."""
    try:
        with closing(socket.create_connection((address.host, address.port), ANSWER_S)) as connection:
            text = b"".join(iter(lambda: connection.recv(1 << 16), b""))
        return Report.decode(text) if text else Silence(f"is gone: {address} has ended")
    except TimeoutError:
        return Silence(f"does not answer: {address} is stopped, unreachable or stuck in native code", _stacks(address))
    except OSError as error:
        return Silence(f"is gone: {address} has ended ({error.strerror})")


def _stacks(address: Address) -> str:
    """What a process wrote of itself without its interpreter."""
    if address.machine != socket.gethostname():
        return "(its stack can be read on its machine only)"
    try:
        text = Path(f"/proc/{address.pid}/fd/{address.stacks}").read_text(errors="replace")
    except OSError as error:
        return f"(its stack cannot be read: {error.strerror})"
    return text or "(it has not reached the deadline of a phase, and so not written its stack)"


def _own_address(host: str, port: int) -> str:
    """This machine's address on the way to `host`."""
    with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as probe:
        probe.connect((host, port))  # sends nothing
        return probe.getsockname()[0]


def _is_broken_collective(error: Exception) -> bool:
    """Whether a collective failed, and not this rank's own work. Gloo raises bare RuntimeErrors."""
    return isinstance(error, dist.DistError) or (type(error) is RuntimeError and "/gloo/" in str(error))

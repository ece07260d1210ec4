"""Ray actors: the process side (`Host`) and the calling side (`RayHandle`, `RayClient`) of a component."""

from __future__ import annotations

import faulthandler
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import (
    GetTimeoutError,
    NodeDiedError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)

from megatron_pbsd.controller.failures import ComponentDied
from megatron_pbsd.errors import Lost

LOG_LINES_SHOWN = 20
COLOURS = "\x1b\\[[0-9;]*m"
STACKS_WAIT_S = 2.0
END_WAIT_S = 10.0


@ray.remote(num_cpus=0, max_restarts=0, max_task_retries=0, concurrency_groups={"observe": 1})
class Host:
    """One component in a process of its own. Everything it prints, native code included, goes to `log`."""

    def __init__(self, name: str, log: str):
        self._name = name
        self._built = threading.Event()
        self._log = open(log, "ab", buffering=0)
        os.dup2(self._log.fileno(), 1)
        os.dup2(self._log.fileno(), 2)
        faulthandler.enable(self._log)
        # A signal reaches the process even while native code holds the interpreter lock.
        faulthandler.register(signal.SIGUSR1, self._log, all_threads=True)

    @ray.method(concurrency_group="observe")
    def pid(self) -> int:
        return os.getpid()

    def build(self, factory: Callable[..., Any], /, *args: Any, **kwargs: Any) -> None:
        # Not in __init__: Ray runs that in another thread than calls, and hides what it raises in a dead actor.
        try:
            self._component = factory(*args, **kwargs)
        finally:
            self._built.set()

    def attempted(self) -> None:
        """Done once `build` is, whether it succeeded or raised."""

    def call(self, attempted: None, method: str, /, *args: Any, **kwargs: Any) -> Any:
        return self._call(method, *args, **kwargs)

    def _call(self, method: str, /, *args: Any, **kwargs: Any) -> Any:
        if not hasattr(self, "_component"):
            raise RuntimeError(f"{self._name}.{method} was called, but {self._name} could not be constructed")
        return getattr(self._component, method)(*args, **kwargs)

    @ray.method(concurrency_group="observe")
    def observe(self, method: str, /, *args: Any, **kwargs: Any) -> Any:
        self._built.wait()
        return self._call(method, *args, **kwargs)


@dataclass(frozen=True)
class RayHandle:
    name: str
    log: str
    actor: ActorHandle
    pid: ray.ObjectRef
    built: ray.ObjectRef
    attempted: ray.ObjectRef

    @classmethod
    def start(cls, name: str, log: str, factory: Callable[..., Any], /, *args: Any, **kwargs: Any) -> RayHandle:
        actor = Host.remote(name, log)
        built = actor.build.remote(factory, *args, **kwargs)
        return cls(name, log, actor, actor.pid.remote(), built, actor.attempted.remote())

    def call(self, method: str, /, *args: Any, **kwargs: Any) -> RayFuture:
        # Ray keeps the order of one process's calls only: another component's would overtake `build`.
        return RayFuture(self.actor.call.remote(self.attempted, method, *args, **kwargs), self)

    def observe(self, method: str, /, *args: Any, **kwargs: Any) -> RayFuture:
        return RayFuture(self.actor.observe.remote(method, *args, **kwargs), self)

    def ready(self) -> RayFuture:
        return RayFuture(self.built, self)


@dataclass(frozen=True)
class RayFuture:
    reference: ray.ObjectRef
    handle: RayHandle

    @property
    def name(self) -> str:
        return self.handle.name


class RayClient:
    """See `runtime.Client`. Works in the driver and in any actor on the same host."""

    def wait(
        self, futures: Sequence[RayFuture], count: int = 1, timeout: float | None = None
    ) -> tuple[list[RayFuture], list[RayFuture]]:
        by_reference = {future.reference: future for future in futures}
        done, pending = ray.wait(list(by_reference), num_returns=count, timeout=timeout)
        return [by_reference[r] for r in done], [by_reference[r] for r in pending]

    def result(self, future: RayFuture) -> Any:
        try:
            return ray.get(future.reference)
        except RayTaskError as error:
            if isinstance(error.cause, Lost):
                raise ComponentDied(future.name, error.cause.cause, error.cause.last_lines) from None
            if isinstance(error.cause, Exception) and not isinstance(error.cause, RayTaskError):
                # The remote traceback is the only one that shows where it happened.
                error.cause.add_note(f"in {future.name}: {re.sub(COLOURS, '', str(error)).strip()}")
                raise error.cause from None
            raise
        except (RayActorError, WorkerCrashedError, OutOfMemoryError, NodeDiedError) as error:
            raise ComponentDied(future.name, _cause(error), last_lines(future.handle.log)) from None

    def stacks(self, futures: Sequence[RayFuture]) -> str:
        handles = {future.name: future.handle for future in futures}
        return "\n".join(f"{name} is at:\n{_stack(handle)}" for name, handle in handles.items())

    def end(self, futures: Sequence[RayFuture]) -> bool:
        for handle in {future.name: future.handle for future in futures}.values():
            _kill(handle)
        # A process is gone when Ray says so: the kernel closes its connections last.
        self.wait(futures, len(futures), timeout=END_WAIT_S)
        return True


def last_lines(log: str, count: int = LOG_LINES_SHOWN) -> list[str]:
    """The last lines of a component's log, without the markers that Ray prints for its own log reader."""
    try:
        lines = Path(log).read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return []
    return [line for line in lines if not re.match(r":(actor_name|job_id|task_name):", line)][-count:]


def _cause(error: Exception) -> str:
    """The one sentence of Ray's message that says something about this death."""
    found = re.search(r"Worker exit detail: (.*?)(?: Some common causes|$)", str(error), re.DOTALL)
    return found.group(1).strip() if found else str(error).strip()


def _kill(handle: RayHandle) -> None:
    # Ray's own way asks the process, which a stopped one does not hear.
    try:
        os.kill(ray.get(handle.pid, timeout=STACKS_WAIT_S), signal.SIGKILL)
    except (ProcessLookupError, RayActorError):
        pass
    except GetTimeoutError:  # It has not come as far as telling its number.
        ray.kill(handle.actor)


def _stack(handle: RayHandle) -> str:
    log = Path(handle.log)
    try:
        before = log.stat().st_size
        os.kill(ray.get(handle.pid, timeout=STACKS_WAIT_S), signal.SIGUSR1)
    except (FileNotFoundError, GetTimeoutError, ProcessLookupError, RayActorError):
        return "(the process has not started or is gone)"
    end, size = time.monotonic() + STACKS_WAIT_S, before
    while time.monotonic() < end:
        time.sleep(0.05)
        previous, size = size, log.stat().st_size
        if size == previous > before:
            break
    with log.open("rb") as file:
        file.seek(before)
        stacks = file.read().decode(errors="replace").rstrip()
    return stacks or "(the process does not react to signals: is it stopped?)"

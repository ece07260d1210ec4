"""Ray actors: the process side (`Host`) and the calling side (`RayHandle`, `RayClient`) of a component."""

from __future__ import annotations

import faulthandler
import os
import re
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import (
    ActorUnschedulableError,
    GetTimeoutError,
    NodeDiedError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from megatron_pbsd.controller.failures import ComponentDied
from megatron_pbsd.controller.machine import STACKS_WAIT_S, Here
from megatron_pbsd.errors import Lost, PbsdError

COLOURS = "\x1b\\[[0-9;]*m"
END_WAIT_S = 10.0
ANSWER_S = 5.0
"""An agent that has not answered by then is on a machine that cannot be reached. Longer than `STACKS_WAIT_S`."""


@dataclass(frozen=True)
class Elsewhere:
    """A machine of a Ray cluster that exists: see `runtime.Machine`. agent: a `Here` on it. node: Ray's id of it.
    environment: variables that its components have, unless they are set. folder: to work in, the driver's."""

    name: str
    address: str
    node: str
    agent: ActorHandle
    environment: Mapping[str, str] = field(default_factory=dict)
    folder: str = ""
    device: int | None = None

    def ask(self, method: str, *args: Any) -> Any:
        """GetTimeoutError, RayActorError when the machine cannot be reached."""
        return ray.get(getattr(self.agent, method).remote(*args), timeout=ANSWER_S)

    def free_port(self) -> int:
        return self.ask("free_port")

    def memory_folder(self) -> str:
        return self.ask("memory_folder")


class WrongMachine(PbsdError):
    """A machine lacks what components need to work on it."""

    component = "controller"


@ray.remote(num_cpus=0, max_restarts=0, max_task_retries=0, concurrency_groups={"observe": 1})
class Host:
    """One component in a process of its own. Everything it prints, native code included, goes to `log`. machine: that
    it is on, unless that is the driver's."""

    def __init__(self, name: str, log: str, machine: Elsewhere | None = None):
        self._name, self._machine = name, machine
        self._built = threading.Event()
        Path(log).parent.mkdir(parents=True, exist_ok=True)
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
            if self._machine is not None:
                self._settle(self._machine)
            self._component = factory(*args, **kwargs)
        finally:
            self._built.set()

    def _settle(self, machine: Elsewhere) -> None:
        """As if the driver had started this process."""
        for name, value in machine.environment.items():
            os.environ.setdefault(name, value)
        try:
            os.chdir(machine.folder)
        except OSError as error:
            raise WrongMachine(f"{self._name} cannot work on {machine.name}, which lacks the folder that the run was "
                               f"started in, {machine.folder} ({error.strerror}): start it in one that all machines "
                               "share") from None

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
    """machine: None for the driver's own, in a cluster of one."""

    name: str
    log: str
    actor: ActorHandle
    pid: ray.ObjectRef
    built: ray.ObjectRef
    attempted: ray.ObjectRef
    machine: Elsewhere | None = None

    @classmethod
    def start(cls, name: str, log: str, machine: Elsewhere | None, factory: Callable[..., Any], /, *args: Any,
              **kwargs: Any) -> RayHandle:
        host = Host if machine is None else Host.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(machine.node, soft=False))
        actor = host.remote(name, log, machine)
        built = actor.build.remote(factory, *args, **kwargs)
        return cls(name, log, actor, actor.pid.remote(), built, actor.attempted.remote(), machine)

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
        except (RayActorError, ActorUnschedulableError, WorkerCrashedError, OutOfMemoryError, NodeDiedError) as error:
            raise ComponentDied(future.name, _cause(error, future.handle), _last_lines(future.handle)) from None

    def stacks(self, futures: Sequence[RayFuture]) -> str:
        handles = {future.name: future.handle for future in futures}
        return "\n".join(f"{name} is at:\n{_stack(handle)}" for name, handle in handles.items())

    def end(self, futures: Sequence[RayFuture]) -> bool:
        handles = {future.name: future.handle for future in futures}.values()
        asked = [reference for handle in handles if (reference := _kill(handle)) is not None]
        if asked:
            ray.wait(asked, num_returns=len(asked), timeout=ANSWER_S)
        # A process is gone when Ray says so: the kernel closes its connections last.
        self.wait(futures, len(futures), timeout=END_WAIT_S)
        return True


UNREACHABLE = (GetTimeoutError, RayActorError)


def _on_its_machine(handle: RayHandle, method: str, *args: Any) -> Any:
    """What `Here` does, there."""
    return getattr(Here(), method)(*args) if handle.machine is None else handle.machine.ask(method, *args)


def _cause(error: Exception, handle: RayHandle) -> str:
    """The one sentence of Ray's message that says something about this death."""
    if "node" in str(error) and handle.machine is not None and not _is_alive(handle.machine):
        return f"its machine, {handle.machine.name} ({handle.machine.address}), is gone or cannot be reached"
    found = re.search(r"Worker exit detail: (.*?)(?: Some common causes|$)", str(error), re.DOTALL)
    return found.group(1).strip() if found else str(error).strip()


def _is_alive(machine: Elsewhere) -> bool:
    return any(node["NodeID"] == machine.node and node["Alive"] for node in ray.nodes())


def _last_lines(handle: RayHandle) -> list[str]:
    try:
        return _on_its_machine(handle, "last_lines", handle.log)
    except UNREACHABLE:  # The folder may be shared.
        return Here().last_lines(handle.log)


def _kill(handle: RayHandle) -> ray.ObjectRef | None:
    """What is ready when the machine's agent has done it, if there is one."""
    # Ray's own way asks the process, which a stopped one does not hear.
    try:
        pid = ray.get(handle.pid, timeout=STACKS_WAIT_S)
    except RayActorError:
        return None
    except GetTimeoutError:  # It has not come as far as telling its number, or its machine cannot be reached.
        ray.kill(handle.actor)
        return None
    if handle.machine is not None:
        return handle.machine.agent.kill.remote(pid)
    return Here().kill(pid)


def _stack(handle: RayHandle) -> str:
    try:
        return _on_its_machine(handle, "stack", ray.get(handle.pid, timeout=STACKS_WAIT_S), handle.log)
    except UNREACHABLE:
        where = "" if handle.machine is None else f", or {handle.machine.name} cannot be reached"
        return f"(the process has not started or is gone{where})"

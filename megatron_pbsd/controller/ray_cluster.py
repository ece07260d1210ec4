"""`runtime: ray`: components as Ray actors on a cluster of this machine that lives as long as the run.

Each actor writes what it prints to `<logs>/<name>.log`. When it dies, the last lines are part of the error; when it
hangs, SIGUSR1 makes it write the stacks of all its threads there.
"""

from __future__ import annotations

import faulthandler
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError

from megatron_pbsd.controller import guard
from megatron_pbsd.controller.runtime import ComponentDied

# Of every process of the cluster; the raylet hands its own environment down.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TORCH_COMPILE_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
    "RAY_DEDUP_LOGS": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_prestart_worker_first_driver": "0",
}
OBJECT_STORE_BYTES = 256 << 20
LOG_LINES = 12
CLOSE_WAIT_S = 5.0
# A socket's path may have 107 bytes, of which Ray's names and ours take 86.
LONGEST_BASE = 20


class _Host:
    """The actor: redirects output, builds the component, forwards calls."""

    def __init__(self, log: str, factory: Callable[..., Any], args: tuple, kwargs: dict[str, Any]):
        file = open(log, "a", buffering=1)
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        faulthandler.register(signal.SIGUSR1, file=file, all_threads=True)
        self._failure: Exception | None = None
        try:
            self._component = factory(*args, **kwargs)
        except Exception as error:
            # Raised here it would reach the caller as a dead actor; kept, it is what the first call raises.
            self._failure = error

    def pid(self) -> int:
        return os.getpid()

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        if self._failure is not None:
            raise self._failure
        return getattr(self._component, method)(*args, **kwargs)


class RayCall:
    def __init__(self, component: str, log: str, reference: ray.ObjectRef):
        self.component = component
        self._log, self.reference = log, reference

    def result(self) -> Any:
        try:
            return ray.get(self.reference)
        except RayTaskError as error:
            # A coordinator's call may itself have failed because of an engine: the innermost cause is the story.
            raise (error.cause if isinstance(error.cause, Exception) else error) from error
        except (RayActorError, OutOfMemoryError) as error:
            raise ComponentDied(
                f"{self.component} died: {_cause(error)} Last lines of its log:\n{_tail(self._log)}") from error


class RayHandle:
    def __init__(self, name: str, log: str, actor: ray.actor.ActorHandle):
        self.name = name
        self._log, self._actor = log, actor
        self._pid = actor.pid.remote()

    def call(self, method: str, /, *args: Any, **kwargs: Any) -> RayCall:
        return RayCall(self.name, self._log, self._actor.call.remote(method, *args, **kwargs))

    def wait(self, calls: Sequence[RayCall], timeout_s: float) -> tuple[list[RayCall], list[RayCall]]:
        by_reference = {call.reference: call for call in calls}
        done, pending = ray.wait(list(by_reference), num_returns=1, timeout=timeout_s)
        if done and pending:
            # Whatever else has arrived meanwhile comes along.
            more, pending = ray.wait(pending, num_returns=len(pending), timeout=0)
            done += more
        return [by_reference[r] for r in done], [by_reference[r] for r in pending]

    def stacks(self) -> str:
        ready, _ = ray.wait([self._pid], timeout=0)
        if not ready:
            return f"still starting. Last lines of its log:\n{_tail(self._log)}"
        with suppress(ProcessLookupError):
            os.kill(ray.get(self._pid), signal.SIGUSR1)
            time.sleep(0.2)   # the handler writes in the actor's own time
        return _tail(self._log, 40)


class RayRuntime:
    """Starts the cluster at construction. logs: folder for the components' output."""

    def __init__(self, logs: Path):
        self._logs = logs
        logs.mkdir(parents=True, exist_ok=True)
        os.environ.update(ENVIRONMENT)
        # Unix sockets live below it, and their paths must stay short.
        base = tempfile.gettempdir()
        self._folder = tempfile.mkdtemp(prefix="pbsd-ray-", dir=base if len(base) <= LONGEST_BASE else "/tmp")
        self._guard: subprocess.Popen | None = None
        others = set(psutil.Process().children())
        try:
            # Actors find modules where the driver does. No CPUs: Ray would start a spare worker for each.
            ray.init(
                address="local", num_cpus=0, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
                object_store_memory=OBJECT_STORE_BYTES, _temp_dir=self._folder,
                runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}})
            # Ray's servers die with the driver, but after a SIGKILL its agents live on for minutes.
            self._guard = guarded(_new_processes(others), self._folder)
        except BaseException:
            self._close(others)
            raise
        self._others = others
        # Ray prints a worker's death to the driver's terminal whatever log_to_driver says; ComponentDied says it too.
        ray._private.worker._worker_logs_enabled = False
        # Ray's own handler, in native code, ends the driver on the spot: nothing would be closed or written.
        signal.signal(signal.SIGTERM, _exit)

    def spawn(self, name: str, factory: Callable[..., Any], /, *args: Any, threads: int = 1, **kwargs: Any) -> RayHandle:
        log = str(self._logs / f"{name}.log")
        actor = ray.remote(_Host).options(
            num_cpus=0, max_restarts=0, max_concurrency=threads).remote(log, factory, args, kwargs)
        return RayHandle(name, log, actor)

    def share(self, value: Any) -> Any:
        return ray.put(value)

    def close(self) -> None:
        self._close(self._others)

    def _close(self, others: set[psutil.Process]) -> None:
        if self._guard is not None:
            self._guard.kill()
            self._guard.communicate()
        processes = _new_processes(others)
        ray.shutdown()
        _, alive = psutil.wait_procs(processes, CLOSE_WAIT_S)
        for process in alive:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, CLOSE_WAIT_S)
        shutil.rmtree(self._folder, ignore_errors=True)


def _exit(number: int, frame: object) -> None:
    sys.exit(128 + number)


def guarded(processes: Sequence[psutil.Process], folder: str) -> subprocess.Popen:
    """A guard that ends `processes` and removes `folder` when this process is gone."""
    command = [sys.executable, "-S", guard.__file__, folder, *(guard.identity(process.pid) for process in processes)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)


def _new_processes(others: set[psutil.Process]) -> list[psutil.Process]:
    """Children that are not among `others`, and all below them."""
    found = []
    for child in psutil.Process().children():
        if child not in others:
            found.append(child)
            with suppress(psutil.NoSuchProcess):
                found += child.children(recursive=True)
    return found


def _cause(error: Exception) -> str:
    """The sentence of Ray's message that is about this death."""
    found = re.search(r"Worker exit detail: (.*?)(?: Some common causes|$)", str(error), re.DOTALL)
    return found[1].strip() if found else str(error).strip()


def _tail(log: str, lines: int = LOG_LINES) -> str:
    path = Path(log)
    text = path.read_text(errors="replace").splitlines() if path.exists() else []
    return "\n".join(f"  {line}" for line in text[-lines:]) or "  (it printed nothing)"

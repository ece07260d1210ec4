"""A Ray cluster on this machine that lives exactly as long as the driver.

Ray binds the life of its servers to the driver's (PR_SET_PDEATHSIG), and actors end when their raylet does. Its agents
would outlive a killed driver, looking for their server: a guard ends them. `close` makes the orderly end quick and
complete.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import ray

from megatron_pbsd.controller import guard
from megatron_pbsd.controller.machine import Here
from megatron_pbsd.controller.ray_host import RayClient, RayHandle
from megatron_pbsd.errors import UsageError
from megatron_pbsd.ports import free_near, is_free

OBJECT_STORE_BYTES = 256 * 2**20
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TORCH_COMPILE_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
SYSTEM_CONFIG = {
    "enable_metrics_collection": False,
    "enable_core_worker_task_event_to_gcs": False,
    # Ray would run components at nice 15, behind whatever else the machine does.
    "worker_niceness": 0,
}
CLOSE_WAIT_S = 5.0


class RayRuntime(RayClient):
    """See `runtime.Runtime`. Component `name` writes its output to `logs/<name>.log`.

    UsageError when `port` is taken.
    """

    def __init__(self, logs: Path, port: int | None = None):
        if port is not None:
            check_port(port)
        logs.mkdir(parents=True, exist_ok=True)
        self._logs, self._here = logs.resolve(), Here()
        self._folder = session_folder()
        self._guard: subprocess.Popen[bytes] | None = None
        before = set(psutil.Process().children())
        try:
            start_ray(self._folder, port)
        except BaseException:
            self._servers = new_children(before)
            self.close()
            raise
        # Only what Ray has started by now: other children of the driver are none of ours.
        self._servers = new_children(before)
        self._guard = start_guard(self._folder, self._processes())

    @property
    def client(self) -> RayClient:
        return RayClient()

    def spawn(self, name: str, factory: Callable[..., Any], /, *args: Any, **kwargs: Any) -> RayHandle:
        return RayHandle.start(name, str(self._logs / f"{name}.log"), None, factory, *args, **kwargs)

    def machine(self, name: str) -> Here:
        return self._here

    def parts(self, name: str) -> list[str]:
        return [name]

    def share(self, value: Any) -> ray.ObjectRef:
        return ray.put(value)

    def _processes(self) -> list[psutil.Process]:
        """What this runtime started, Ray's servers and all below them."""
        return self._servers + [child for server in self._servers for child in children(server)]

    def close(self) -> None:
        if self._guard is not None:
            self._guard.kill()
            self._guard.communicate()
        processes = self._processes()
        ray.shutdown()
        _, alive = psutil.wait_procs(processes, timeout=CLOSE_WAIT_S)
        for process in alive:
            process.kill()
        psutil.wait_procs(alive, timeout=CLOSE_WAIT_S)
        shutil.rmtree(self._folder, ignore_errors=True)
        self._here.close()

    def __enter__(self) -> RayRuntime:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def new_children(before: Collection[psutil.Process]) -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if child not in before]


def children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def start_guard(folder: Path, processes: Sequence[psutil.Process]) -> subprocess.Popen[bytes]:
    """Ends `processes` and removes `folder` when this process is gone."""
    command = [sys.executable, "-S", guard.__file__, str(folder), *(guard.identity(p.pid) for p in processes)]
    # A session of its own: Ctrl-C is for the driver.
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)


def start_ray(folder: Path, port: int | None) -> None:
    with variables({} if port is None else {"RAY_GCS_SERVER_PORT": str(port)}):
        init(
            address="local",
            # Components say themselves what they use; 0 keeps Ray from starting spare workers.
            num_cpus=0,
            num_gpus=0,
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            _temp_dir=str(folder),
            _system_config=SYSTEM_CONFIG,
        )


def init(**arguments: Any) -> None:
    """`ray.init` that leaves the driver's terminal and signals alone."""
    logging.getLogger("ray").setLevel(logging.ERROR)
    terminate = signal.getsignal(signal.SIGTERM)
    ray.init(log_to_driver=False, logging_level=logging.ERROR, runtime_env={"env_vars": ENVIRONMENT}, **arguments)
    # Ray prints the death of a worker to the driver's terminal whatever log_to_driver says; ComponentDied says it too.
    ray._private.worker._worker_logs_enabled = False
    # Ray's handler, in native code, would end the driver on the spot; the program's own unwinds.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, terminate)


@contextmanager
def variables(values: dict[str, str]) -> Iterator[None]:
    """Environment variables for the processes started inside."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def session_folder() -> Path:
    """A folder of our own for Ray's sockets and files. Socket paths may have 107 bytes, of which Ray takes about 65."""
    return Path(tempfile.mkdtemp(prefix="pbsd-ray-", dir=min(tempfile.gettempdir(), "/tmp", key=len)))


def check_port(port: int) -> None:
    """UsageError, with a free port to take instead, when `port` is in use."""
    if not is_free(port):
        raise UsageError(
            f"ray_port = {port} is in use by another process; {free_near(port)} is free, and without ray_port Ray "
            "takes any free one")

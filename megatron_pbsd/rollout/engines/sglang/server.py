"""A server process and everything below it: started, watched, ended."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_pbsd.ports import free_near, is_free
from megatron_pbsd.rollout.engines.protocol import EngineDied, EngineError
from megatron_pbsd.rollout.engines.sglang import keeper
from megatron_pbsd.rollout.engines.sglang.client import Client, Refused, Unreachable
from megatron_pbsd.rollout.engines.sglang.replies import WeightsName

INSIDE = Path(__file__).with_name("inside")
POLL_S = 0.25
LOG_LINES_SHOWN = 30
LAST_WORDS_S = 15.0
ATTEMPTS = 3


@dataclass(frozen=True)
class Launch:
    """python: interpreter of the environment that SGLang is in. arguments: of its ServerArgs, `host`, `port` and
    `weight_version` left out. environment: the server's variables, all of them. port: None takes a free one.
    log: where the server's output goes. start_s, answer_s: for how long it is waited for, to start and to answer.
    """

    python: str
    arguments: Mapping[str, Any]
    log: Path
    environment: Mapping[str, str]
    port: int | None = None
    start_s: float = 600.0
    answer_s: float = 300.0


class Server:
    """Runs from construction to `close`, and no longer than this process.

    EngineError when it cannot be started as asked; EngineDied, with the end of its log, when it does not become ready.
    """

    def __init__(self, name: str, launch: Launch):
        self.name, self._launch = name, launch
        self.weights = WeightsName(uuid.uuid4().hex[:12], 0)
        launch.log.parent.mkdir(parents=True, exist_ok=True)
        for attempt in range(ATTEMPTS):
            port = self._port()
            self._start(port)
            try:
                self._wait()
                return
            except EngineDied as death:
                self.close()
                # Between choosing a free port and taking it somebody else may have.
                taken = any("address already in use" in line.lower() for line in death.last_lines)
                if launch.port is not None or not taken or attempt + 1 == ATTEMPTS:
                    raise

    def _port(self) -> int:
        if self._launch.port is None:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                return probe.getsockname()[1]
        if not is_free(self._launch.port):
            raise EngineError(
                f"engine {self.name!r}: port {self._launch.port} is taken by another process; "
                f"{free_near(self._launch.port)} is free "
                "(rollout.sglang.port is that of the first engine; null takes any free ones)")
        return self._launch.port

    def _start(self, port: int) -> None:
        launch = self._launch
        sweep()
        folder = tempfile.mkdtemp(prefix=f"pbsd-sglang-{os.getpid()}-", dir=short_temporary())
        arguments = {**launch.arguments, "host": "127.0.0.1", "port": port, "weight_version": str(self.weights)}
        environment = {"SGLANG_RETURN_ORIGINAL_LOGPROB": "1", "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1",
                       **launch.environment, "TMPDIR": folder}
        command = [sys.executable, "-S", keeper.__file__, folder,
                   launch.python, "-W", "ignore", str(INSIDE / "serve.py"), json.dumps(arguments)]
        with launch.log.open("ab") as log:
            self._log_start = log.tell()
            # A session of its own: Ctrl-C is for the driver.
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment, start_new_session=True)
        self.client = Client(port, launch.answer_s)

    def _wait(self) -> None:
        end = time.monotonic() + self._launch.start_s
        while time.monotonic() < end:
            try:
                status = self._process.wait(POLL_S)
            except subprocess.TimeoutExpired:
                if self._ready():
                    return
            else:
                raise self._death(f"its server ended with status {status} before it was ready")
        raise self._death(f"its server was not ready within rollout.sglang.start_deadline_s = {self._launch.start_s:g}")

    def _ready(self) -> bool:
        try:
            self.client.get("/health", POLL_S * 40)
            served = json.loads(self.client.get("/model_info"))["weight_version"]
        except (Unreachable, Refused):
            return False
        # Or it is somebody else's server that answers at this port.
        return served == str(self.weights)

    def post(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """Refused; EngineDied when nobody answers."""
        try:
            return self.client.post(path, body)
        except Unreachable as error:
            raise self.lost(error) from error

    def get(self, path: str) -> str:
        try:
            return self.client.get(path)
        except Unreachable as error:
            raise self.lost(error) from error

    def lost(self, error: Unreachable) -> EngineDied:
        """What has become of it, now that a call has failed. It is ended, if it is not."""
        try:
            # The server's processes end one after the other; the last words are in the log when all have.
            status = self._process.wait(LAST_WORDS_S)
            cause = f"its server ended with status {status}"
        except subprocess.TimeoutExpired:
            cause = f"its server does not answer ({error})"
        death = self._death(cause)
        self.close()
        return death

    def condemned(self, cause: str) -> EngineDied:
        """It is ended because of this."""
        death = self._death(cause)
        self.close()
        return death

    def _death(self, cause: str) -> EngineDied:
        return EngineDied(self.name, f"{cause}; its log is {self._launch.log}", self.last_lines())

    def last_lines(self) -> tuple[str, ...]:
        """The end of what this server wrote."""
        with self._launch.log.open("rb") as log:
            log.seek(self._log_start)
            lines = log.read().decode(errors="replace").splitlines()
        return tuple(line for line in lines if line.strip())[-LOG_LINES_SHOWN:]

    @property
    def closed(self) -> bool:
        return self._process.poll() is not None

    def close(self) -> None:
        """Ends all of its processes."""
        self._process.stdin.close()
        self._process.wait()


def sweep() -> None:
    """Remove temporary folders of servers whose keepers were killed before they could."""
    for path in Path(short_temporary()).glob("pbsd-sglang-*-*"):
        if not Path("/proc", path.name.split("-")[2]).exists():
            shutil.rmtree(path, ignore_errors=True)


def short_temporary() -> str:
    """Socket paths may have 107 bytes."""
    return min(tempfile.gettempdir(), "/tmp", key=len)

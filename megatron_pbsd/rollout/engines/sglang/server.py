"""A server and everything below it, on one machine or several: started, watched, ended."""

from __future__ import annotations

import json
import time
import uuid
from pathlib import Path
from typing import Any

from megatron_pbsd.ports import free_near, free_port, is_free
from megatron_pbsd.rollout.engines.protocol import EngineDied, EngineError
from megatron_pbsd.rollout.engines.sglang.client import Client, Refused, Unreachable
from megatron_pbsd.rollout.engines.sglang.lifeline import Parts
from megatron_pbsd.rollout.engines.sglang.processes import Launch, Processes
from megatron_pbsd.rollout.engines.sglang.replies import WeightsName

POLL_S = 0.25
LAST_WORDS_S = 15.0
ATTEMPTS = 3


class Server:
    """Runs from construction to `close`, and no longer than this process.

    EngineError when it cannot be started as asked; EngineDied, with the end of its log, when it does not become ready.
    """

    def __init__(self, name: str, launch: Launch):
        self.name, self._launch = name, launch
        self.weights = WeightsName(uuid.uuid4().hex[:12], 0)
        self._parts = None if launch.meeting is None else Parts(launch.meeting, launch.start_s)
        for attempt in range(ATTEMPTS):
            port = self._port()
            self._start(port)
            try:
                self._wait()
                return
            except EngineDied:
                self.close()
                # Between choosing a free port and taking it somebody else may have.
                taken = self._processes.have_said("address already in use")
                if launch.port is not None or self._parts or not taken or attempt + 1 == ATTEMPTS:
                    raise

    def _port(self) -> int:
        if self._launch.port is None:
            return free_port()
        if not is_free(self._launch.port):
            raise EngineError(
                f"engine {self.name!r}: port {self._launch.port} is taken by another process; "
                f"{free_near(self._launch.port)} is free "
                "(rollout.sglang.port is that of the first engine; null takes any free ones)")
        return self._launch.port

    def _start(self, port: int) -> None:
        arguments: dict[str, Any] = {"weight_version": str(self.weights)}
        if self._parts:
            arguments = self._parts.start(arguments)
        self._processes = Processes(self._launch, {**arguments, "port": port})
        if self._parts:
            # Without one of its parts a server hangs, which is as good as dead.
            self._parts.watch(self._processes.close)
        self.client = Client(port, self._launch.answer_s)

    def _wait(self) -> None:
        end = time.monotonic() + self._launch.start_s
        while time.monotonic() < end:
            status = self._processes.wait(POLL_S)
            if status is not None:
                raise self.condemned(f"its server ended with status {status} before it was ready")
            if self._ready():
                return
        raise self.condemned(
            f"its server was not ready within rollout.sglang.start_deadline_s = {self._launch.start_s:g}")

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
        # The server's processes end one after the other; the last words are in the log when all have.
        status = self._processes.wait(LAST_WORDS_S)
        return self.condemned(f"its server does not answer ({error})" if status is None else
                              f"its server ended with status {status}")

    def condemned(self, cause: str) -> EngineDied:
        """It is ended because of this, on all of its machines."""
        # Parts of a server follow one another; the one that began may have its word yet.
        words = self._parts.end(LAST_WORDS_S if self._processes.closed else 0.0) if self._parts else []
        causes = [f"{each.name}: {each.cause}" for each in words] + [f"{cause}; its log is {self._launch.log}"]
        lines = self._processes.last_lines() + tuple(
            f"{each.name.removeprefix(self.name + '.')} | {line}" for each in words for line in each.lines)
        self._processes.close()
        return EngineDied(self.name, "; ".join(causes), lines)

    @property
    def closed(self) -> bool:
        return self._processes.closed

    @property
    def shared(self) -> Path:
        return self._launch.shared

    def close(self) -> None:
        """Ends all of its processes, wherever they are."""
        self._processes.close()
        if self._parts:
            self._parts.end(0.0)

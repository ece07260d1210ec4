"""Ray's part of one machine: the head or a worker of the run's cluster, `ray start --block`."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from launcher.node.meeting import NodeError, wait_until
from launcher.node.processes import end, start

# As of ray_cluster.py, for a cluster of many.
OBJECT_STORE_BYTES = 256 * 2**20
STARTED = b"Ray runtime started"
SYSTEM_CONFIG = {"enable_metrics_collection": False, "enable_core_worker_task_event_to_gcs": False,
                 "worker_niceness": 0}
SHOWN_LINES = 5


def command(address: str, ports: range, gpus: int, folder: Path, join: str | None) -> list[str]:
    """Its command line. address: of this machine. join: 'host:port' of the head, None for the head itself."""
    gcs, node, objects, environments, agent, agent_grpc, metrics = ports[:7]
    role = ["--address", join] if join else [
        "--head", "--port", str(gcs), "--include-dashboard", "false", "--system-config", json.dumps(SYSTEM_CONFIG)]
    return [
        str(Path(sys.executable).with_name("ray")), "start", *role, "--block", "--node-ip-address", address,
        "--num-cpus", "0", "--num-gpus", str(gpus), "--object-store-memory", str(OBJECT_STORE_BYTES),
        "--temp-dir", str(folder), "--include-log-monitor", "false", "--disable-usage-stats", "--log-style", "record",
        "--log-color", "false", "--node-manager-port", str(node), "--object-manager-port", str(objects),
        "--runtime-env-agent-port", str(environments), "--dashboard-agent-listen-port", str(agent),
        "--dashboard-agent-grpc-port", str(agent_grpc), "--metrics-export-port", str(metrics)]


class RayServer:
    """Started, and ended with `close`. log: what it prints. folder: of its sockets and files, removed in the end."""

    def __init__(self, line: list[str], environ: Mapping[str, str], log: Path, folder: Path):
        self._log, self._folder = log, folder
        with log.open("ab") as output:
            self._process = start(line, environ, stdout=output, stderr=subprocess.STDOUT)

    @property
    def pid(self) -> int:
        return self._process.pid

    def is_up(self) -> bool:
        with suppress(OSError):
            return STARTED in self._log.read_bytes()
        return False

    def wait(self, deadline_s: float) -> None:
        """Until it is part of the cluster. NodeError with what it said when it ends first, or is late."""
        wait_until(lambda: self.is_up() or self.is_gone(), deadline_s)
        if self.is_gone() or not self.is_up():
            raise NodeError(f"Ray did not start on {socket.gethostname()} within {deadline_s:g} s: {self.last_words()}")

    def is_gone(self) -> bool:
        return self._process.poll() is not None

    def last_words(self) -> str:
        """Which of its processes died, or the end of what it said, in a line."""
        text = self._log.read_text(errors="replace") if self._log.exists() else ""
        said = re.findall(r"-- (\S+ \[exit code=[^]]*\])", text) or [
            line.strip() for line in text.splitlines() if line.strip()][-SHOWN_LINES:]
        return f"{'; '.join(said) or 'it said nothing'} ({self._log})"

    def close(self) -> None:
        end(self._process)
        shutil.rmtree(self._folder, ignore_errors=True)

"""The processes of a server on this machine: started, watched, ended."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_pbsd.resharding.shared_folder import ROOT
from megatron_pbsd.rollout.engines.sglang import keeper
from megatron_pbsd.rollout.engines.sglang.lifeline import Meeting

INSIDE = Path(__file__).with_name("inside")
LOG_LINES_SHOWN = 30
LEAK = re.compile(r"nanobind: | - (leaked |\.\.\. skipped)|See https://nanobind\.")
"""What Triton's bindings say in each process that ends of an error, in more lines than are shown."""


@dataclass(frozen=True)
class Launch:
    """python: interpreter of the environment that SGLang is in. arguments: of its ServerArgs, `host`, `port`,
    `weight_version` and what differs between machines left out. environment: the server's variables, all of them.
    port: None takes a free one. log: where the output of one machine's processes goes. start_s, answer_s: for how long
    the server is waited for, to start and to answer. meeting: for a server on several machines. shared: a folder that
    its processes see, whatever machine they are on.
    """

    python: str
    arguments: Mapping[str, Any]
    log: Path
    environment: Mapping[str, str]
    port: int | None = None
    start_s: float = 600.0
    answer_s: float = 300.0
    meeting: Meeting | None = None
    shared: Path = ROOT


class Processes:
    """They run from construction to `close`, and no longer than this process. arguments: that `launch` leaves out."""

    def __init__(self, launch: Launch, arguments: Mapping[str, Any]):
        sweep()
        folder = tempfile.mkdtemp(prefix=f"pbsd-sglang-{os.getpid()}-", dir=short_temporary())
        environment = {"SGLANG_RETURN_ORIGINAL_LOGPROB": "1", "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1",
                       # For dumps of GPUs it would wait a minute before it ends of an error.
                       "SGLANG_CUDA_COREDUMP_BEFORE_CRASH": "0",
                       **launch.environment, "TMPDIR": folder}
        command = [sys.executable, "-S", keeper.__file__, folder, launch.python, "-W", "ignore",
                   str(INSIDE / "serve.py"), json.dumps({**launch.arguments, "host": "127.0.0.1", **arguments})]
        self.log = launch.log
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self._log_start = log.tell()
            # A session of its own: Ctrl-C is for the driver.
            self.keeper = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment, start_new_session=True)

    def wait(self, timeout_s: float) -> int | None:
        """Their status when they have ended by then."""
        with suppress(subprocess.TimeoutExpired):
            return self.keeper.wait(timeout_s)
        return None

    @property
    def closed(self) -> bool:
        return self.keeper.poll() is not None

    def last_lines(self) -> tuple[str, ...]:
        """The end of what they wrote."""
        lines = (line for line in self._output().splitlines() if line.strip() and not LEAK.match(line))
        return tuple(lines)[-LOG_LINES_SHOWN:]

    def have_said(self, words: str) -> bool:
        """Whether they have written this, in whatever case. words: in lower case."""
        return words in self._output().lower()

    def _output(self) -> str:
        with self.log.open("rb") as log:
            log.seek(self._log_start)
            return log.read().decode(errors="replace")

    def close(self) -> None:
        """Ends all of them."""
        self.keeper.stdin.close()
        self.keeper.wait()


def sweep() -> None:
    """Remove temporary folders of servers whose keepers were killed before they could."""
    for path in Path(short_temporary()).glob("pbsd-sglang-*-*"):
        if not Path("/proc", path.name.split("-")[2]).exists():
            shutil.rmtree(path, ignore_errors=True)


def short_temporary() -> str:
    """Socket paths may have 107 bytes."""
    return min(tempfile.gettempdir(), "/tmp", key=len)

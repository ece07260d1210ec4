"""Processes that `pbsd node` starts: they are marked, end with it, and are ended with all below them."""

from __future__ import annotations

import ctypes
import signal
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

import psutil

PR_SET_PDEATHSIG = 1
LIBC = ctypes.CDLL(None)
GRACE_S = 10.0


def start(command: Sequence[str], environ: Mapping[str, str], **options: Any) -> subprocess.Popen:
    """In a session of its own: signals are for `pbsd node`, which passes on what is meant for it."""
    return subprocess.Popen(list(command), env=dict(environ), stdin=subprocess.DEVNULL, start_new_session=True,
                            preexec_fn=_die_with_parent, **options)


def _die_with_parent() -> None:
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def end(process: subprocess.Popen, grace_s: float = GRACE_S) -> int:
    """Ask it to end, and after `grace_s` make it; its exit code as a shell has it. Nothing below it is left."""
    below = _below(process)
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(grace_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    _, left = psutil.wait_procs(below, timeout=1.0)
    for each in left:
        each.kill()
    return exit_code(process.returncode)


def exit_code(returned: int) -> int:
    """Of a process that a signal ended: 128 + its number."""
    return returned if returned >= 0 else 128 - returned


def _below(process: subprocess.Popen) -> list[psutil.Process]:
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []

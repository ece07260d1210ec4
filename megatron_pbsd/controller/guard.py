"""Ends processes when the one that started this script is gone, however it went.

    python guard.py FOLDER PID:START PID:START ...

Its standard input is a pipe that only the driver holds open. START, from /proc, tells a process from a later one of the
same number. FOLDER, the driver's own, is removed. It imports little, to be small and to start fast.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys


def started(pid: int) -> str | None:
    """Time the process started (clock ticks since boot), None when there is none."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            # The second field, the name, may hold anything, brackets and blanks included.
            return file.read().rpartition(")")[2].split()[19]
    except OSError:
        return None


def identity(pid: int) -> str:
    return f"{pid}:{started(pid)}"


def main(folder: str, identities: list[str]) -> None:
    sys.stdin.buffer.read()
    for known in identities:
        pid = int(known.partition(":")[0])
        if identity(pid) == known:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])

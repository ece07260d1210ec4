"""Keeps a command for as long as the process that started this script lives, however that one ends.

    python keeper.py FOLDER COMMAND …

Its standard input is a pipe that only the starting process holds open. When that is closed, or the command has ended,
whatever is left of the command's processes is ended, and FOLDER removed. Its exit status is the command's. It imports
little, to be small and to start fast.
"""

from __future__ import annotations

import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
from contextlib import suppress

PR_SET_PDEATHSIG = 1


def follow() -> None:
    """In the child: it does not outlive this script either."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main(folder: str, command: list[str]) -> int:
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=follow)
    ended = os.pidfd_open(child.pid)
    select.select([sys.stdin, ended], [], [])
    # What was asked to end would take seconds to; nothing of it is to be kept.
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    status = child.wait()
    shutil.rmtree(folder, ignore_errors=True)
    return 128 - status if status < 0 else status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))

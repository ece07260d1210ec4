"""Memory of a process and everything below it."""

from __future__ import annotations

import threading
from collections.abc import Callable

import psutil


def tree(pid: int) -> list[psutil.Process]:
    """The process and all that descend from it; Ray's raylet and actors are among its children's children."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def proportional_memory(pid: int) -> int:
    """Bytes held by the tree: proportional set sizes, so that a page shared by n processes counts once in all."""
    total = 0
    for process in tree(pid):
        try:
            total += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total


class PeakMemory(threading.Thread):
    """Samples the tree of `pid()` every `interval` seconds between `start` and `stop`; `peak` is in bytes."""

    def __init__(self, pid: Callable[[], int], interval: float = 1.0):
        super().__init__(daemon=True)
        self.peak = 0
        self._pid, self._interval, self._done = pid, interval, threading.Event()

    def run(self) -> None:
        while not self._done.wait(self._interval):
            self.peak = max(self.peak, proportional_memory(self._pid()))

    def stop(self) -> int:
        self._done.set()
        self.join()
        return self.peak

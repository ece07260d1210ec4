"""Ends a process that is stuck in one step: on a connection that a cut network left half open, a dead file system."""

from __future__ import annotations

import os
import sys
import threading
import time

EXIT_CODE = 1


class Watchdog:
    """From the first `enter` until `close` no step takes longer than `limit_s`."""

    def __init__(self, who: str, limit_s: float):
        self._who, self._limit_s = who, limit_s
        self._step, self._end = "", float("inf")
        self._changed = threading.Condition()
        threading.Thread(target=self._watch, name="preflight watchdog", daemon=True).start()

    def enter(self, step: str) -> None:
        with self._changed:
            self._step, self._end = step, time.monotonic() + self._limit_s
            self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._end = -1.0
            self._changed.notify()

    def _watch(self) -> None:
        with self._changed:
            while self._end >= 0:
                left = self._end - time.monotonic()
                if left <= 0:
                    print(f"pbsd: preflight: {self._who} has been in '{self._step}' for {self._limit_s:g} s, and gives "
                          "up: what it waits for hangs, or the network to node 0 was cut", file=sys.stderr, flush=True)
                    os._exit(EXIT_CODE)
                self._changed.wait(min(left, threading.TIMEOUT_MAX))

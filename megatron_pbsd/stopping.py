"""Asking a run to end before its last step: after the step that it is in, with a checkpoint to go on from.

Either way works at any time: SIGUSR1 to the driver, or a file `stop` in the run's folder, which any machine can write
that sees the folder.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

STOP = "stop"


class StopRequest:
    """Whether the run in `folder` has been asked to end."""

    def __init__(self, folder: Path):
        self._file = folder / STOP
        self._signalled = False

    def __bool__(self) -> bool:
        return self._signalled or self._file.exists()

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Inside, SIGUSR1 asks; in the main thread. A file that has asked is gone afterwards: it asked once."""
        before = signal.signal(signal.SIGUSR1, self._ask)
        try:
            yield self
        finally:
            signal.signal(signal.SIGUSR1, before)
            self._file.unlink(missing_ok=True)

    def _ask(self, *_: object) -> None:
        self._signalled = True

"""Base classes of the errors that end a run with a message instead of a traceback, and a phrase of such messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import ClassVar


class PbsdError(RuntimeError):
    """A part of the run failed. The message says what happened to which object; `component` says where.

    The command line prints `component: message`, keeps the traceback in the run's error.log and exits with 1.
    """

    component: ClassVar[str] = "run"


class UsageError(PbsdError):
    """What was asked for cannot be done as asked; nothing has started. The command line exits with 2."""

    component: ClassVar[str] = "usage"


class Lost(PbsdError):
    """What a component needs to go on is gone, though its own process is not: to all others it is dead.

    name: the component's. last_lines: the end of what was written about it.
    """

    def __init__(self, name: str, cause: str, last_lines: Sequence[str] = ()):
        super().__init__(name, cause, tuple(last_lines))
        self.name, self.cause, self.last_lines = name, cause, tuple(last_lines)


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or nothing if no choice is near."""
    near = difflib.get_close_matches(word, list(choices), 1)
    return f"; did you mean {near[0]!r}?" if near else ""

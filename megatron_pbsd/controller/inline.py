"""`runtime: inline`: every component in this process, every call done at once. For debugging."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any


class Done:
    def __init__(self, component: str, value: Any):
        self.component = component
        self._value = value

    def result(self) -> Any:
        return self._value


class InlineHandle:
    """Errors of the component leave `call` as they are, with its stack: that is what inline is for."""

    def __init__(self, name: str, component: Any):
        self.name = name
        self._component = component

    def call(self, method: str, /, *args: Any, **kwargs: Any) -> Done:
        return Done(self.name, getattr(self._component, method)(*args, **kwargs))

    def wait(self, calls: Sequence[Done], timeout_s: float) -> tuple[list[Done], list[Done]]:
        return list(calls), []

    def stacks(self) -> str:
        return "".join(traceback.format_stack(sys._getframe()))


class InlineRuntime:
    def spawn(self, name: str, factory: Callable[..., Any], /, *args: Any, threads: int = 1, **kwargs: Any) -> InlineHandle:
        return InlineHandle(name, factory(*args, **kwargs))

    def share(self, value: Any) -> Any:
        return value

    def close(self) -> None:
        """Components end with the process."""

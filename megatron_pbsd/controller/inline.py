"""All components in this process; a call runs at once. For debugging: breakpoints and profilers see everything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_pbsd.controller.failures import ComponentDied
from megatron_pbsd.controller.machine import Here
from megatron_pbsd.errors import Lost


@dataclass(frozen=True)
class InlineFuture:
    name: str
    value: Any = None
    error: Exception | None = None


@dataclass(frozen=True)
class InlineHandle:
    name: str
    component: Any

    def call(self, method: str, /, *args: Any, **kwargs: Any) -> InlineFuture:
        try:
            return InlineFuture(self.name, getattr(self.component, method)(*args, **kwargs))
        except Exception as error:
            return InlineFuture(self.name, error=error)

    observe = call

    def ready(self) -> InlineFuture:
        return InlineFuture(self.name)


class InlineRuntime:
    """See `runtime.Runtime`. `spawn` raises what the constructor raises."""

    def __init__(self) -> None:
        self._here = Here()

    @property
    def client(self) -> InlineRuntime:
        return self

    def spawn(self, name: str, factory: Callable[..., Any], /, *args: Any, **kwargs: Any) -> InlineHandle:
        return InlineHandle(name, factory(*args, **kwargs))

    def machine(self, name: str) -> Here:
        return self._here

    def parts(self, name: str) -> list[str]:
        return [name]

    def wait(
        self, futures: Sequence[InlineFuture], count: int = 1, timeout: float | None = None
    ) -> tuple[list[InlineFuture], list[InlineFuture]]:
        return list(futures), []

    def result(self, future: InlineFuture) -> Any:
        if isinstance(future.error, Lost):
            raise ComponentDied(future.name, future.error.cause, future.error.last_lines) from future.error
        if future.error is not None:
            raise future.error
        return future.value

    def stacks(self, futures: Sequence[InlineFuture]) -> str:
        return ""

    def end(self, futures: Sequence[InlineFuture]) -> bool:
        return False

    def share(self, value: Any) -> Any:
        return value

    def close(self) -> None:
        self._here.close()

    def __enter__(self) -> InlineRuntime:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

"""Where components run: behind handles, in this process or as Ray actors. The loop cannot tell the difference."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from megatron_pbsd.errors import PbsdError


class ComponentDied(PbsdError):
    """A component's process is gone; the message names it and ends with the last lines of its log."""

    component = "controller"


class DeadlineExpired(PbsdError):
    """A phase took longer than its deadline; the message names the components that did not answer."""

    component = "controller"


class Call(Protocol):
    """A method call under way. `component` is the name of the one called."""

    component: str

    def result(self) -> Any:
        """The returned value; raises what the method raised, or ComponentDied. Blocks until there is one."""


class Handle(Protocol):
    """Speaks for a component; can be passed on to other components."""

    name: str

    def call(self, method: str, /, *args: Any, **kwargs: Any) -> Call: ...

    def wait(self, calls: Sequence[Call], timeout_s: float) -> tuple[list[Call], list[Call]]:
        """(done, pending): returns when at least one of `calls` is done, or after the time-out."""

    def stacks(self) -> str:
        """What the component's threads are doing, as far as can be told."""


class Runtime(Protocol):
    def spawn(self, name: str, factory: Callable[..., Any], /, *args: Any, threads: int = 1, **kwargs: Any) -> Handle:
        """Start `factory(*args, **kwargs)` as a component that serves `threads` calls at a time.

        Errors of the factory surface at the first call. The component lives as long as there is a handle to it.
        """

    def share(self, value: Any) -> Any:
        """A reference to `value` that is cheap to pass to many components as a call's argument."""

    def close(self) -> None:
        """Stop every component and leave no process behind."""


# When a rank dies its peers' collectives fail too, and may be heard of first.
CAUSE_WAIT_S = 0.5


def gather(phase: str, handles: Sequence[Handle], calls: Sequence[Call], deadline_s: float) -> list[Any]:
    """Results of all calls, in order. The first failure wins at once, whatever the other components do.

    A rank that died leaves the others hanging in a collective; waiting for them in order would hide who it was. Where
    its peers notice and fail as well, the death is what is raised.
    """
    pending, results = list(calls), {}
    expires = time.monotonic() + deadline_s
    while pending:
        done, pending = handles[0].wait(pending, max(expires - time.monotonic(), 0.0))
        for call in done:
            try:
                results[id(call)] = call.result()
            except ComponentDied:
                raise
            except Exception:
                _raise_death(handles[0], [c for c in calls if id(c) not in results and c is not call])
                raise
        if not done:
            missing = [call.component for call in pending]
            stacks = "\n".join(f"{handle.name}:\n{handle.stacks()}" for handle in handles if handle.name in missing)
            raise DeadlineExpired(f"phase {phase!r}: no answer from {', '.join(missing)} within {deadline_s:g} s\n"
                                  + stacks)
    return [results[id(call)] for call in calls]


def _raise_death(handle: Handle, calls: Sequence[Call]) -> None:
    """ComponentDied, if that is how any of `calls` ends within moments."""
    pending, expires = list(calls), time.monotonic() + CAUSE_WAIT_S
    while pending:
        done, pending = handle.wait(pending, max(expires - time.monotonic(), 0.0))
        if not done:
            return
        for call in done:
            try:
                call.result()
            except ComponentDied:
                raise
            except Exception:
                continue

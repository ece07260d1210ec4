"""Like components that are called together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from megatron_pbsd.controller.gather import gather
from megatron_pbsd.controller.runtime import Future, Handle, Runtime


class Group:
    """`handles`: the members, in order. `deadline_s`: for every phase, seconds."""

    kind: ClassVar[str]

    def __init__(self, runtime: Runtime, handles: Sequence[Handle], deadline_s: float):
        self.handles = list(handles)
        self.names = [handle.name for handle in handles]
        self._runtime, self._deadline_s = runtime, deadline_s

    def ready(self) -> None:
        """Wait until all members have been constructed."""
        self._gather("start", [handle.ready() for handle in self.handles])

    def call(self, method: str, *args: Any) -> list[Any]:
        return self._gather(method, [handle.call(method, *args) for handle in self.handles])

    def start(self, method: str, *args: Any, only: Sequence[str] | None = None) -> list[Future]:
        """Begin with a call of all members, or of those that are named."""
        chosen = self.handles if only is None else [handle for handle in self.handles if handle.name in only]
        return [handle.call(method, *args) for handle in chosen]

    def wait(self, phase: str, pending: Sequence[Future]) -> list[Any]:
        """What was started, here or with other components too, in order."""
        return self._gather(phase, pending)

    def _gather(self, phase: str, futures: Sequence[Future]) -> list[Any]:
        return gather(self._runtime, futures, phase=f"{self.kind}.{phase}", deadline_s=self._deadline_s)

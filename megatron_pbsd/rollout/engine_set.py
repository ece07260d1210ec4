"""The engines that take part in rollouts, while they join, leave and die."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from megatron_pbsd.controller.failures import ComponentDied, DeadlineExpired
from megatron_pbsd.controller.gather import end_hung, gather
from megatron_pbsd.controller.runtime import Client, Handle
from megatron_pbsd.rollout.errors import RolloutError


class EngineSet:
    """handles: by name, those that are there. deaths: in the order they were noticed.

    `join` and `leave` may be called from any thread, and take effect when the rollout's thread calls `arrivals` and
    `departures`.
    """

    def __init__(self, handles: Sequence[Handle], client: Client, deadline_s: float):
        self.handles = {handle.name: handle for handle in handles}
        self.deaths: list[ComponentDied] = []
        self._client, self._deadline_s = client, deadline_s
        self._joining: deque[Handle] = deque()
        self._leaving: deque[str] = deque()

    def join(self, handle: Handle) -> None:
        self._joining.append(handle)

    def leave(self, name: str) -> None:
        self._leaving.append(name)

    def arrivals(self) -> list[Handle]:
        """Engines that have joined since the last call; they are there from now on. Between rollouts one may take the
        place of another of its name."""
        arrived = [self._joining.popleft() for _ in range(len(self._joining))]
        self.handles |= {handle.name: handle for handle in arrived}
        return arrived

    def departures(self) -> list[str]:
        """Engines that are to leave as soon as their chunks have ended: `left` then says so. Those that have died since
        they were asked to are gone already."""
        dead = {death.name for death in self.deaths} - self.handles.keys()
        asked = [name for _ in range(len(self._leaving)) if (name := self._leaving.popleft()) not in dead]
        if unknown := [name for name in asked if name not in self.handles]:
            raise RolloutError(f"engines {unknown} cannot leave: those that are there are {sorted(self.handles)}")
        return asked

    def left(self, name: str) -> None:
        del self.handles[name]
        print(f"{name} has left the rollout", flush=True)

    def died(self, death: ComponentDied) -> None:
        """Go on without it; raises `death` when it was the last."""
        self.deaths.append(death)
        del self.handles[death.name]
        if not self.handles:
            raise death
        print(f"{death}\nThe rollout goes on with {', '.join(self.handles)}", flush=True)

    def ask(self, method: str, arguments: dict[str, Sequence[Any]] | None = None) -> dict[str, Any]:
        """The answers of all by name, those left out that turn out to have died, or hang and are ended. arguments: by
        name, if any."""
        calls = {name: handle.call(method, *(arguments or {}).get(name, ())) for name, handle in self.handles.items()}
        answers = {}
        for name, call in calls.items():
            try:
                answers[name], = gather(
                    self._client, [call], phase=f"rollout.{method}", deadline_s=self._deadline_s)
            except ComponentDied as death:
                self.died(death)
            except DeadlineExpired as expired:
                for death in end_hung(self._client, expired, [call]):
                    self.died(death)
        return answers

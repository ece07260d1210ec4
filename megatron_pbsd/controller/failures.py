"""What can go wrong between components: one of them dies, or one of them does not answer."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_pbsd.errors import PbsdError


class ComponentDied(PbsdError):
    """The process of component `name` is gone. `last_lines` is the end of what it wrote to its log."""

    component = "controller"

    def __init__(self, name: str, cause: str, last_lines: Sequence[str] = ()):
        super().__init__(name, cause, tuple(last_lines))
        self.name, self.cause, self.last_lines = name, cause, tuple(last_lines)

    def __str__(self) -> str:
        tail = "".join(f"\n  {self.name} | {line}" for line in self.last_lines)
        return f"{self.name} died: {self.cause}" + (f"\nThe end of its log:{tail}" if tail else "")


class DeadlineExpired(PbsdError):
    """Components `missing` did not finish `phase` within `deadline_s`. `stacks` shows where each of them is."""

    component = "controller"

    def __init__(self, phase: str, deadline_s: float, missing: Sequence[str], stacks: str = ""):
        super().__init__(phase, deadline_s, tuple(missing), stacks)
        self.phase, self.deadline_s, self.missing, self.stacks = phase, deadline_s, tuple(missing), stacks

    def __str__(self) -> str:
        message = f"phase {self.phase!r}: no answer within {self.deadline_s:g} s from {', '.join(self.missing)}"
        return f"{message}\n{self.stacks}" if self.stacks else message


class ComponentHung(ComponentDied, DeadlineExpired):
    """Component `name` was among those that `expired`, and its process has been ended since: it cannot come back and
    answer, or write to memory that it shares."""

    def __init__(self, name: str, expired: DeadlineExpired):
        PbsdError.__init__(self, name, expired)
        self.name, self.last_lines = name, ()
        self.cause = f"it hung, with no answer for {expired.deadline_s:g} s in phase {expired.phase!r}, and was ended"
        self.phase, self.deadline_s, self.missing = expired.phase, expired.deadline_s, (name,)
        self.stacks = expired.stacks

    def __str__(self) -> str:
        return f"{DeadlineExpired.__str__(self)}\n{self.name} was ended"


class PeersHung(PbsdError):
    """A component that is well waited in vain for others like it, or was broken off: the fault is theirs."""

    component = "controller"

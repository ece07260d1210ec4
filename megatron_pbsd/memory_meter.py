"""What is used of memory in each phase, beside what was predicted (`memory_account.py`)."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from typing import Protocol

from megatron_pbsd.memory_account import Account
from megatron_pbsd.platform.usage import MemoryUse, total

DEVIATION, LEAST_BYTES = 0.25, 1 << 30
"""What is said in words is more than both: of what was predicted, and at all."""


class Component(Protocol):
    """Many processes."""

    def memory(self) -> list[MemoryUse]: ...


class MemoryMeter:
    """What components had before anything else, libraries above all, is taken off: it is what they used after the first
    publication, without what they said they held.
    """

    def __init__(self, account: Account, components: Sequence[Component]):
        self._account, self._components = account, components
        self._base: int | None = None
        self._trained = False
        self._found: dict[str, float] = {}
        self._said: set[str] = set()

    def leaving(self, phase: str) -> None:
        """Measure, at the end of a phase. Not before the first optimizer step, which makes the optimizer's state."""
        uses = [use for component in self._components for use in component.memory()]
        used = total(uses)
        held = Counter[str]()
        for use in uses:
            held.update(use.held)
        if self._base is None:
            self._base = used - sum(held.values())
        self._trained |= phase == "train"
        if self._trained:
            self._compare(phase, used - self._base, held)

    def metrics(self) -> dict[str, float]:
        """Of the phases that have ended since the last call: memory/<phase>/predicted_gb and used_gb, and what was
        there before, memory/base_gb."""
        found, self._found = self._found, {}
        return found

    def _compare(self, phase: str, used: int, held: Counter[str]) -> None:
        predicted = self._account.of(phase)
        self._found |= {f"memory/{phase}/predicted_gb": predicted / 1e9, f"memory/{phase}/used_gb": used / 1e9,
                        "memory/base_gb": self._base / 1e9}
        if abs(used - predicted) > max(DEVIATION * predicted, LEAST_BYTES) and phase not in self._said:
            self._said.add(phase)
            print(f"pbsd: memory in the phase {phase!r}: {used / 1e9:.2f} GB are used beside the "
                  f"{self._base / 1e9:.2f} GB of libraries, {predicted / 1e9:.2f} GB were predicted (pbsd memory). "
                  "Components hold " + ", ".join(f"{name} {n / 1e9:.2f}" for name, n in held.items() if n)
                  + " GB; the rest is activations and what allocators keep", file=sys.stderr)

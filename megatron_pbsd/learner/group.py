"""All ranks of the learner as one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_pbsd.batch import Batch
from megatron_pbsd.controller.group import Group
from megatron_pbsd.controller.runtime import Runtime

if TYPE_CHECKING:
    from megatron_pbsd.learner.update import Update
    from megatron_pbsd.losses import Loss
    from megatron_pbsd.platform.usage import MemoryUse


LAST_WORD_S = 8.0
"""Ranks whose phase outlasts its deadline say which of them is at fault, which the driver cannot: it waits for that."""


class LearnerGroup(Group):
    """All ranks of the learner, called alike; see `learner.Learner` for what each method does."""

    kind = "learner"

    @classmethod
    def spawn(
        cls, runtime: Runtime, factory: Callable[..., Any], *, world_size: int, deadline_s: float, **arguments: Any
    ) -> LearnerGroup:
        """Start `factory(rank, rendezvous, **arguments)` for every rank. Does not wait for them: see `ready`.

        deadline_s:  of the ranks' own phases; they are given a little longer to say what went wrong.
        """
        machine = runtime.machine("learner-0")
        rendezvous = f"tcp://{machine.address}:{machine.free_port()}"
        return cls(runtime, [
            runtime.spawn(f"learner-{rank}", factory, rank, rendezvous, **arguments) for rank in range(world_size)
        ], deadline_s + LAST_WORD_S)

    def meeting_point(self) -> tuple[str, int]:
        """Host and port where rank 0 may listen for others to come."""
        machine = self._runtime.machine(self.names[0])
        return machine.address, machine.free_port()

    def log_probs(self, batch: Batch) -> list[np.ndarray]:
        return self.call("log_probs", self._runtime.share(batch))[0]

    def score(self, batch: Batch, outputs: Sequence[str], top: int = 0) -> dict[str, list[np.ndarray]]:
        return self.call("score", self._runtime.share(batch), tuple(outputs), top)[0]

    def step(self, batch: Batch, loss: Loss | None = None) -> Update:
        """`loss`: what this step minimises; None for what the learner was built with."""
        return self.call("step", self._runtime.share(batch), *([] if loss is None else [loss]))[0]

    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        return self.call("tensors")[0]

    def save(self, folder: str, wait: bool) -> None:
        """Every rank's part of a checkpoint into `folder`; `torch_dist.assemble` makes it one once all are there.

        wait: until they are; otherwise the ranks write while they go on (`torch_dist.unfinished`, `failures`).
        """
        self.call("save", folder)
        if wait:
            self.saved()

    def saved(self) -> None:
        """Wait until what the last `save` began is on disk."""
        self.call("saved")

    def load(self, folder: str) -> None:
        self.call("load", folder)

    def replace_weights(self, folder: str, steps: int) -> None:
        self.call("replace_weights", folder, steps)

    def release(self, phase: str, keep: Sequence[str] = ()) -> dict[str, int]:
        """Bytes that the ranks give back together, by category."""
        released = self.call("release", phase, keep)
        return {name: sum(rank[name] for rank in released) for name in released[0]}

    def regain(self, categories: Sequence[str] | None = None) -> None:
        self.call("regain", categories)

    def memory(self) -> list[MemoryUse]:
        return self.call("memory")

    def close(self) -> None:
        self.call("close")

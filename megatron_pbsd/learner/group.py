"""All ranks of the learner as one."""

from __future__ import annotations

import random
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_pbsd.batch import Batch
from megatron_pbsd.controller.group import Group
from megatron_pbsd.controller.runtime import Runtime
from megatron_pbsd.learner.errors import LearnerError

if TYPE_CHECKING:
    from megatron_pbsd.learner.update import Update
    from megatron_pbsd.losses import Loss
    from megatron_pbsd.resharding.manifest import WeightsManifest


PORTS = range(20_000, 32_768)
"""Between those of Ray's workers and those that Linux gives to whoever asks for any: nobody else takes one by chance
before rank 0 listens there."""
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
        rendezvous = f"tcp://127.0.0.1:{free_port()}"
        return cls(runtime, [
            runtime.spawn(f"learner-{rank}", factory, rank, rendezvous, **arguments) for rank in range(world_size)
        ], deadline_s + LAST_WORD_S)

    def log_probs(self, batch: Batch) -> list[np.ndarray]:
        return self.call("log_probs", self._runtime.share(batch))[0]

    def score(self, batch: Batch, outputs: Sequence[str], top: int = 0) -> dict[str, list[np.ndarray]]:
        return self.call("score", self._runtime.share(batch), tuple(outputs), top)[0]

    def step(self, batch: Batch, loss: Loss | None = None) -> Update:
        """`loss`: what this step minimises; None for what the learner was built with."""
        return self.call("step", self._runtime.share(batch), *([] if loss is None else [loss]))[0]

    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        return self.call("tensors")[0]

    def publish(self, manifest: WeightsManifest) -> None:
        self.call("publish", manifest)

    def differing(self, manifest: WeightsManifest) -> list[str]:
        """Tensors that some rank finds published with other bytes than it holds."""
        return list(dict.fromkeys(name for names in self.call("differing", manifest) for name in names))

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

    def release(self, phase: str) -> dict[str, int]:
        """Bytes that the ranks give back together, by category."""
        released = self.call("release", phase)
        return {name: sum(rank[name] for rank in released) for name in released[0]}

    def regain(self) -> None:
        self.call("regain")

    def close(self) -> None:
        self.call("close")


def free_port() -> int:
    """A TCP port of this machine that nobody listens on at the moment."""
    for port in random.SystemRandom().sample(PORTS, len(PORTS)):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port
    raise LearnerError(f"no TCP port from {PORTS.start} to {PORTS.stop - 1} is free")

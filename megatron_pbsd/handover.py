"""The memory of the devices that learner and engines share: who has what in each phase of a step.

    phase    learner has                       engines have
    train    everything                        what does not sleep
    publish  parameters, communicators         weights
    rollout  nothing                           everything
    save     everything but gradients          weights, if they had them

Entering a phase begins with what is given away and ends with what is taken. It may be entered again, in whatever state
learner and engines are: an engine that was started anew in between comes with all of its memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from megatron_pbsd.config import RunConfig
from megatron_pbsd.learner.categories import CATEGORIES

PUBLISHED = ("parameters", "communicators")
SAVED = ("parameters", "master_weights", "optimizer_state", "communicators")
SLEEPING = {"none": (), "kv_cache": ("kv_cache",), "all": ("kv_cache", "weights")}
"""`rollout.sleep` → tags of the engines' memory (`engines.protocol.MEMORY_TAGS`)."""


PHASES = {"train": (CATEGORIES, ()), "publish": (PUBLISHED, ("weights",)), "rollout": ((), ("kv_cache", "weights")),
          "save": (SAVED, ("weights",))}
"""What learner and engines hold when they give away all that they can."""


def held(phase: str, config: RunConfig) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The learner's categories and the engines' tags that are held in a phase of the loop, as configured."""
    categories, tags = PHASES[phase]
    sleeping = SLEEPING[config.rollout.sleep]
    return (categories if config.learner.release_memory else CATEGORIES,
            tuple(tag for tag in ("kv_cache", "weights") if tag in tags or tag not in sleeping))


class Learner(Protocol):
    """All ranks of it."""

    def release(self, phase: str, keep: Sequence[str] = ()) -> dict[str, int]: ...
    def regain(self, categories: Sequence[str] | None = None) -> None: ...


class Engines(Protocol):
    """All of them. One that has died has given everything away: `sleep` does not mind."""

    def sleep(self, tags: Sequence[str]) -> None: ...
    def wake(self, tags: Sequence[str]) -> None: ...


class HandOver:
    """Does what `learner.release_memory` and `rollout.sleep` say, which may be nothing.

    leaving: called with the name of a phase when it ends, before anything is handed over.
    """

    def __init__(self, learner: Learner, engines: Engines, config: RunConfig,
                 leaving: Callable[[str], None] = lambda phase: None):
        self._learner, self._engines = learner, engines
        self._releases, self._tags = config.learner.release_memory, SLEEPING[config.rollout.sleep]
        self._weights_slept = False
        self._phase, self._leaving = "", leaving

    def train(self) -> None:
        self._enter("train")
        self._sleep("kv_cache", "weights")
        self._regain(None)

    def publish(self) -> bool:
        """Whether the engines' weights slept, and are undefined now."""
        self._enter("publish")
        self._sleep("kv_cache")
        self._release("the publication", PUBLISHED)
        self._regain(PUBLISHED)
        self._wake("weights")
        slept, self._weights_slept = self._weights_slept, False
        return slept

    def rollout(self) -> None:
        self._enter("rollout")
        self._release("the rollout")
        self._wake("weights", "kv_cache")

    def save(self) -> None:
        self._enter("save")
        self._sleep("kv_cache")
        self._regain(SAVED)

    def _enter(self, phase: str) -> None:
        if self._phase not in ("", phase):
            self._leaving(self._phase)
        self._phase = phase

    def _sleep(self, *tags: str) -> None:
        if asleep := [tag for tag in tags if tag in self._tags]:
            self._engines.sleep(asleep)
            self._weights_slept |= "weights" in asleep

    def _wake(self, *tags: str) -> None:
        if awake := [tag for tag in tags if tag in self._tags]:
            self._engines.wake(awake)

    def _release(self, phase: str, keep: Sequence[str] = ()) -> None:
        if self._releases:
            self._learner.release(phase, keep)

    def _regain(self, categories: Sequence[str] | None) -> None:
        if self._releases:
            self._learner.regain(categories)

"""Which of an engine's memory is given away, and what the engine must refuse meanwhile."""

from __future__ import annotations

from collections.abc import Collection

from megatron_pbsd.errors import did_you_mean
from megatron_pbsd.rollout.engines.protocol import MEMORY_TAGS, EngineError


class Occupancy:
    """asleep: the tags whose memory is given away. has_weights: False from the time that weights are given away until
    some have been published."""

    def __init__(self, engine: str, has_weights: bool = True):
        self._engine = engine
        self.asleep: set[str] = set()
        self.has_weights = has_weights

    def to_give(self, tags: Collection[str], in_flight: int) -> list[str]:
        """Which of `tags` are to be given away: those that have not been. in_flight: chunks that run or wait.

        EngineError for a tag that does not exist, and while there are chunks: they need all of it.
        """
        self._check(tags)
        if tags and in_flight:
            raise EngineError(f"engine {self._engine!r} cannot sleep: {in_flight} chunks are in flight; collect or "
                              "abort them first")
        return [tag for tag in MEMORY_TAGS if tag in tags and tag not in self.asleep]

    def given(self, tag: str) -> None:
        self.asleep.add(tag)
        if tag == "weights":
            self.has_weights = False

    def to_take(self, tags: Collection[str]) -> list[str]:
        """Which of `tags` are to be taken back. EngineError for a tag that does not exist."""
        self._check(tags)
        return [tag for tag in reversed(MEMORY_TAGS) if tag in tags and tag in self.asleep]

    def taken(self, tag: str) -> None:
        self.asleep.remove(tag)

    def require(self, use: str, tags: Collection[str] = MEMORY_TAGS) -> None:
        """EngineError when something that `use` needs is asleep, or weights have not come since they were."""
        missing = [tag for tag in MEMORY_TAGS if tag in tags and tag in self.asleep]
        if missing:
            raise EngineError(f"engine {self._engine!r}: {use} needs {' and '.join(missing)}, whose memory sleeps; "
                              "wake it first")
        if "weights" in tags and not self.has_weights:
            raise EngineError(f"engine {self._engine!r} has no weights yet: {use} needs a publication first")

    def require_memory(self, use: str) -> None:
        """EngineError when there is no memory for weights, whether or not there are any."""
        if "weights" in self.asleep:
            raise EngineError(
                f"engine {self._engine!r}: {use} needs the memory of weights, which sleeps; wake it first")

    def _check(self, tags: Collection[str]) -> None:
        for tag in tags:
            if tag not in MEMORY_TAGS:
                raise EngineError(f"engine {self._engine!r} has no memory {tag!r}; there are {', '.join(MEMORY_TAGS)}"
                                  + did_you_mean(tag, MEMORY_TAGS))

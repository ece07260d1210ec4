"""What each engine has yet to be told of what a group's members read and generated at other engines."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from megatron_pbsd.rollout.engines.protocol import Chunk, SiblingTokens


class Exchange:
    """Of one rollout. Siblings' tokens travel with a group's chunks, and so are as new as the last finished chunks."""

    def __init__(self) -> None:
        self._contexts: dict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
        self._group_of: dict[str, str] = {}
        # By engine and request: how many tokens of it the engine has seen.
        self._seen: dict[str, dict[str, int]] = defaultdict(dict)

    def sent(self, engine: str, chunk: Chunk) -> Chunk:
        """The chunk as the engine is to get it, which from now on has seen its context, and its siblings'."""
        group, seen = chunk.group_id, self._seen[engine]
        news = [SiblingTokens(name, seen.get(name, 0), tokens[seen.get(name, 0) :])
                for name, tokens in self._contexts[group].items()
                if name != chunk.request_id and len(tokens) > seen.get(name, 0)]
        seen |= {told.request_id: told.start + len(told.tokens) for told in news}
        seen[chunk.request_id] = len(chunk.tokens)
        self._contexts[group][chunk.request_id], self._group_of[chunk.request_id] = chunk.tokens, group
        return replace(chunk, siblings=tuple(news))

    def returned(self, engine: str, request_id: str, tokens: Sequence[int]) -> None:
        """The request's chunk has ended there with these new tokens."""
        contexts = self._contexts[self._group_of[request_id]]
        contexts[request_id] += tuple(tokens)
        self._seen[engine][request_id] = len(contexts[request_id])

    def lost(self, engine: str) -> None:
        """Whoever comes under this name has seen nothing."""
        self._seen.pop(engine, None)

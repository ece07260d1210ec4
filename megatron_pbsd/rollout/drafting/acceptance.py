"""How long drafts from siblings would have been accepted, had trajectories that exist been generated with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_pbsd.rollout.drafting.draft_tree import DraftTree
from megatron_pbsd.rollout.drafting.groups import DraftGroups
from megatron_pbsd.rollout.drafting.verification import agreeing


@dataclass(frozen=True)
class Trace:
    """A trajectory's tokens, prompt included; those of `generated` spans [start, end) came from the policy."""

    tokens: tuple[int, ...]
    generated: tuple[tuple[int, int], ...]


@dataclass
class Accepted:
    """passes: forward passes that generate, one per draft, empty ones included. tokens: what they would generate.
    drafted: tokens of drafts, those that paths have in common counted once."""

    passes: int = 0
    tokens: int = 0
    drafted: int = 0

    @property
    def mean(self) -> float:
        """Mean acceptance length, with the bonus token that every pass gives."""
        return self.tokens / self.passes


def acceptance(
    group: Sequence[Trace], siblings: int, *, width: int = 1, longest: int = 8, least: float = 0.0, depth: int = 64
) -> Accepted:
    """Of every trace, drafted for from `siblings` others that were finished before, and from itself.

    With `width` paths, that of them which agrees longest counts: as if all had been verified in one pass.
    """
    found = Accepted()
    for i, trace in enumerate(group):
        groups = DraftGroups(depth=depth)
        groups.register("")
        for k in range(siblings):
            groups.update("", str(k), 0, group[(i + 1 + k) % len(group)].tokens)
        for start, end in trace.generated:
            at = start
            while at < end:
                groups.update("", "ours", groups.known("", "ours"), trace.tokens[groups.known("", "ours") : at])
                paths = [path.tokens for path in groups.paths("", "ours", width, min(longest, end - at - 1), least)]
                kept = max((agreeing(path, trace.tokens[at:end]) for path in paths), default=0)
                found.drafted += len(DraftTree.of(paths))
                found.passes += 1
                found.tokens += kept + 1
                at += kept + 1
    return found

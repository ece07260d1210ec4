"""Grouped speculative decoding in the embedded engine: who is drafted for, and what becomes of the drafts."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence as Sequences

from megatron_pbsd.rollout.drafting.draft_lengths import DraftLengths
from megatron_pbsd.rollout.drafting.draft_tree import NO_DRAFT, DraftTree
from megatron_pbsd.rollout.drafting.groups import DraftGroups
from megatron_pbsd.rollout.drafting.suffix_automaton import warm_up
from megatron_pbsd.rollout.engines.embedded.sequence import Sequence
from megatron_pbsd.rollout.engines.protocol import Chunk, SiblingTokens

LEAST_CHANCE = 0.1
"""A draft ends where its tokens have followed its suffix less often than this, of all times that anything did."""

MOST_GROUPS = 1024
"""Groups of which news is kept until there is a draft."""


class Speculation:
    """longest: path of a draft. paths: of a draft, at most. always: draft as much as there is, whatever it costs; for
    tests and measurements. clock: what steps are timed by, in seconds: see `clock_of`."""

    def __init__(
        self, longest: int, paths: int = 1, always: bool = False, clock: Callable[[], float] = time.process_time
    ):
        # Not when the first draft is made, whose cost is measured.
        warm_up()
        self._groups, self._lengths, self._always = DraftGroups(), DraftLengths(longest, paths), always
        self._paths, self.nodes_beside_a_path = paths, (paths - 1) * longest
        self._news: dict[str, list[SiblingTokens]] = {}
        self._clock, self._began, self._own, self._rests = clock, 0.0, 0.0, False
        self._reads: list[int] = []
        self.drafts = self.drafted = self.accepted = 0

    def learn(self, chunk: Chunk) -> None:
        """What siblings have read and generated elsewhere."""
        for sibling in chunk.siblings:
            self._note(_group(chunk), sibling)

    def remember(self, sequence: Sequence) -> None:
        """What a sequence whose chunk has ended has read and generated."""
        self._note(_group(sequence.chunk), SiblingTokens(sequence.request_id, 0, sequence.tokens))

    def _note(self, group: str, news: SiblingTokens) -> None:
        """Drafts need it, and nothing else: as long as there are none, it costs nothing."""
        self._news.setdefault(group, []).append(news)
        if len(self._news) > MOST_GROUPS:
            del self._news[next(iter(self._news))]

    def _take_in(self, group: str) -> None:
        self._groups.register(group)
        for news in self._news.pop(group, ()):
            known = self._groups.known(group, news.request_id)
            if news.start <= known:
                self._groups.update(group, news.request_id, known, news.tokens[known - news.start :])

    def propose(self, running: Collection[Sequence]) -> None:
        """Set the drafts that the next step is to verify. It begins now."""
        self._began = self._clock()
        self._rests = not self._always and self._lengths.rests(len(running))
        if self._rests:
            return
        unread = [len(s.tokens) - s.computed for s in running]
        self._reads = [n for n in unread if n > 1]
        decoding = [s for s, n in zip(running, unread) if n == 1]
        if not decoding or not (self._always or self._lengths.worthwhile(len(running), self._reads)):
            return
        drafts = [self._draft(s) for s in decoding]
        self._lengths.available(len(running), drafts)
        if not self._always:
            drafts = self._lengths.choose(drafts, len(running), self._reads)
        for sequence, draft in zip(decoding, drafts):
            sequence.draft = draft

    def _draft(self, sequence: Sequence) -> DraftTree:
        """The last token that the chunk has room for is the bonus."""
        longest = min(self._lengths.longest, sequence.limit - len(sequence.tokens) - 1)
        if longest < 1:
            return NO_DRAFT
        group, request_id = _group(sequence.chunk), sequence.request_id
        self._take_in(group)
        known = self._groups.known(group, request_id)
        self._groups.update(group, request_id, known, sequence.tokens[known:])
        return DraftTree.of(
            [path.tokens for path in self._groups.paths(group, request_id, self._paths, longest, LEAST_CHANCE)])

    def verified(self, drafts: Sequences[DraftTree], kept: Sequences[Sequences[int]]) -> None:
        """The step is over. Per sequence its draft, and which of its nodes were accepted."""
        ended = self._clock()
        seconds, self._own = ended - self._began + self._own, 0.0
        if self._rests:
            return self._lengths.rested(seconds)
        self._lengths.observe(len(drafts), self._reads, drafts, kept, seconds)
        self.drafts += sum(len(draft) > 0 for draft in drafts)
        self.drafted += sum(map(len, drafts))
        self.accepted += sum(map(len, kept))
        self._own = self._clock() - ended


def clock_of(device: str) -> Callable[[], float]:
    """By what to time an engine's steps. On a CPU by the seconds of this process, as those of others' work on the same
    cores say nothing; what another device takes only the wall clock knows."""
    return time.process_time if device == "cpu" else time.perf_counter


def _group(chunk: Chunk) -> str:
    return chunk.group_id or chunk.request_id

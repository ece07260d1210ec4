"""Grouped drafting for a server of requests, each of which says what group it is of.

A server that computes with several processes hands every request to each of them, in the same order. What requests say
is therefore known in all of them before the same pass, and all make the same drafts; news that came some other way
would not be.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_pbsd.rollout.drafting.draft_tree import DraftTree
from megatron_pbsd.rollout.drafting.groups import DraftGroups
from megatron_pbsd.rollout.drafting.request_news import GROUP, REQUEST, Told, taken
from megatron_pbsd.rollout.drafting.suffix_automaton import warm_up

WIDTH = 4
"""Paths of which a tree is made."""


class RequestDrafts:
    """nodes: of a draft tree, at most. budget: see DraftGroups."""

    def __init__(self, nodes: int, budget: int = 4_000_000):
        warm_up()
        self._nodes, self._groups = nodes, DraftGroups(budget)

    def learn(self, said: Told) -> None:
        """What siblings did elsewhere. News that continue what is not known, as it was forgotten, say nothing."""
        group = said[GROUP]
        self._groups.register(group)
        for request, start, tokens in taken(said):
            known = self._groups.known(group, request)
            if start <= known:
                self._groups.update(group, request, known, tokens[known - start :])

    def remember(self, said: Told, prompt: Sequence[int], generated: Sequence[int]) -> None:
        """What a request has read and generated, of which only what is new is looked at."""
        group, request = said[GROUP], said[REQUEST]
        self._groups.register(group)
        known = self._groups.known(group, request)
        new = [*prompt[known:], *generated[max(0, known - len(prompt)) :]]
        self._groups.update(group, request, known, new)

    def tree(self, said: Told, longest: int) -> DraftTree:
        """How a request that was remembered is likely to go on. longest: most tokens of a path."""
        paths = self._groups.paths(said[GROUP], said[REQUEST], WIDTH, min(longest, self._nodes))
        return DraftTree.likeliest(paths, self._nodes)

"""What the members of each group have read and generated, from which every one of them is drafted for."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_pbsd.errors import PbsdError, did_you_mean
from megatron_pbsd.rollout.drafting.suffix_automaton import Draft, SuffixAutomaton


class DraftError(PbsdError):
    """A group was told or asked something that does not fit what it knows; the message names group and request."""

    component = "rollout"


@dataclass
class _Group:
    automaton: SuffixAutomaton
    sequences: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, array] = field(default_factory=dict)


class DraftGroups:
    """budget: most tokens to know in all groups together; beyond it, the group that was least recently registered or
    updated is forgotten. depth: see SuffixAutomaton."""

    def __init__(self, budget: int = 4_000_000, depth: int = 64):
        self._budget, self._depth = budget, depth
        # In order of use, the latest last.
        self._groups: dict[str, _Group] = {}
        self.tokens = 0

    def __contains__(self, group: str) -> bool:
        return group in self._groups

    def register(self, group: str) -> None:
        """Begin a group, or say that a known one is still in use."""
        self._groups[group] = self._groups.pop(group, None) or _Group(SuffixAutomaton(self._depth))

    def forget(self, group: str) -> None:
        """An unknown group is ignored."""
        if known := self._groups.pop(group, None):
            self.tokens -= known.automaton.tokens

    def known(self, group: str, request: str) -> int:
        """How many tokens of the request its group knows."""
        return len(self._groups[group].tokens.get(request, ())) if group in self._groups else 0

    def update(self, group: str, request: str, start: int, tokens: Sequence[int]) -> None:
        """`tokens` are those of the request, prompt included, from its token `start` on.

        What is known of them is skipped, so that an update may come twice, or late. DraftError when there is a gap
        between what is known and `start`, or other tokens are known.
        """
        here = self._group(group)
        known = here.tokens.get(request, array("i"))
        if start > len(known):
            raise DraftError(f"group {group!r}, request {request!r}: tokens from {start} on were told, but only "
                             f"{len(known)} before them; tell those from {len(known)} on first")
        new = array("i", tokens)
        overlap = min(len(known) - start, len(new))
        if known[start : start + overlap] != new[:overlap]:
            at = next(i for i in range(overlap) if known[start + i] != new[i])
            raise DraftError(f"group {group!r}, request {request!r}: token {start + at} is {new[at]}, but was "
                             f"{known[start + at]} before; a request's tokens never change")
        if request not in here.sequences:
            here.sequences[request], here.tokens[request] = here.automaton.add_sequence(), known
        if len(new) > overlap:
            known += new[overlap:]
            here.automaton.append(here.sequences[request], np.frombuffer(new, np.int32)[overlap:])
            self.tokens += len(new) - overlap
        self.register(group)
        while self.tokens > self._budget and len(self._groups) > 1:
            self.forget(next(iter(self._groups)))

    def draft(self, group: str, request: str, longest: int, least: float = 0.0) -> Draft:
        """How the request is likely to go on: see SuffixAutomaton.draft."""
        return self._group(group).automaton.draft(self._sequence(group, request), longest, least)

    def paths(self, group: str, request: str, width: int, longest: int, least: float = 0.0) -> list[Draft]:
        """In which ways the request is likely to go on: see SuffixAutomaton.paths."""
        return self._group(group).automaton.paths(self._sequence(group, request), width, longest, least)

    def _group(self, group: str) -> _Group:
        if group not in self._groups:
            raise DraftError(f"group {group!r} is not registered{did_you_mean(group, list(self._groups))}")
        return self._groups[group]

    def _sequence(self, group: str, request: str) -> int:
        sequences = self._groups[group].sequences
        if request not in sequences:
            raise DraftError(
                f"group {group!r} knows no request {request!r}{did_you_mean(request, list(sequences))}")
        return sequences[request]

"""A suffix automaton over several growing sequences, with counts: what has followed what, compiled by numba.

States are sets of substrings that end at the same places (Blumer et al., Theor. Comput. Sci. 40, 1985; of several
sequences: J. ACM 34, 1987). Following a token from a state leads to the longer substrings; a state's link leads to its
longest proper suffix that ends at more places. The number of places is the state's count; it is kept for substrings of
at most `depth` tokens, so that an appended token adds to at most `depth` counts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit

ROOT, NONE = 0, -1
# Columns of the tables, all of them int32.
LENGTH, LINK, COUNT, EDGES = range(4)  # of states: longest substring, link, places, first edge
SOURCE, TOKEN, TARGET, NEXT = range(4)  # of edges; NEXT is another edge of the same source
LAST, NEAR = range(2)  # of sequences: the state of all of it, and of its last `depth` tokens
STATES, USED_EDGES = range(2)  # of sizes

compiled = njit(cache=True)


@compiled
def _hash(source: int, token: int, mask: int) -> int:
    mixed = np.int64(source) * np.int64(0x9E3779B97F4A7C1) ^ np.int64(token) * np.int64(0x2545F4914F6CDD1D)
    return (mixed ^ (mixed >> np.int64(29))) & mask


@compiled
def _find(edges: np.ndarray, table: np.ndarray, source: int, token: int) -> int:
    """The edge, or NONE."""
    mask = table.shape[0] - 1
    at = _hash(source, token, mask)
    while table[at] != NONE:
        edge = table[at]
        if edges[edge, SOURCE] == source and edges[edge, TOKEN] == token:
            return edge
        at = (at + 1) & mask
    return NONE


@compiled
def _enter(edges: np.ndarray, table: np.ndarray, edge: int) -> None:
    mask = table.shape[0] - 1
    at = _hash(edges[edge, SOURCE], edges[edge, TOKEN], mask)
    while table[at] != NONE:
        at = (at + 1) & mask
    table[at] = edge


@compiled
def _enter_all(edges: np.ndarray, table: np.ndarray, count: int) -> None:
    for edge in range(count):
        _enter(edges, table, edge)


@compiled
def _connect(states, edges, table, sizes, source, token, target):
    edge = sizes[USED_EDGES]
    sizes[USED_EDGES] += 1
    edges[edge, SOURCE], edges[edge, TOKEN], edges[edge, TARGET] = source, token, target
    edges[edge, NEXT] = states[source, EDGES]
    states[source, EDGES] = edge
    _enter(edges, table, edge)


@compiled
def _state(states, sizes, length, link, count):
    state = sizes[STATES]
    sizes[STATES] += 1
    states[state, LENGTH], states[state, LINK], states[state, COUNT], states[state, EDGES] = length, link, count, NONE
    return state


@compiled
def _split(states, edges, table, sizes, source, token, target):
    """Part the substrings of `target` that are no longer than those of `source` and `token` from the longer ones."""
    part = _state(states, sizes, states[source, LENGTH] + 1, states[target, LINK], states[target, COUNT])
    edge = states[target, EDGES]
    while edge != NONE:
        _connect(states, edges, table, sizes, part, edges[edge, TOKEN], edges[edge, TARGET])
        edge = edges[edge, NEXT]
    while source != NONE:
        edge = _find(edges, table, source, token)
        if edges[edge, TARGET] != target:
            break
        edges[edge, TARGET] = part
        source = states[source, LINK]
    states[target, LINK] = part
    return part


@compiled
def _followed(states, edges, table, sizes, source, token, edge):
    """The state of the longest substring of `source`, and then `token`, where `edge` leads."""
    target = edges[edge, TARGET]
    if states[target, LENGTH] == states[source, LENGTH] + 1:
        return target
    return _split(states, edges, table, sizes, source, token, target)


@compiled
def _append(states, edges, table, sizes, ends, sequence, tokens, depth):
    for token in tokens:
        source = ends[sequence, LAST]
        edge = _find(edges, table, source, token)
        if edge != NONE:
            last = _followed(states, edges, table, sizes, source, token, edge)
        else:
            last = _state(states, sizes, states[source, LENGTH] + 1, ROOT, 0)
            while source != NONE and edge == NONE:
                _connect(states, edges, table, sizes, source, token, last)
                source = states[source, LINK]
                if source != NONE:
                    edge = _find(edges, table, source, token)
            if source != NONE:
                states[last, LINK] = _followed(states, edges, table, sizes, source, token, edge)
        ends[sequence, LAST] = last
        near = edges[_find(edges, table, _within(states, ends[sequence, NEAR], depth), token), TARGET]
        near = _within(states, near, depth)
        ends[sequence, NEAR] = near
        while near != ROOT:
            states[near, COUNT] += 1
            near = states[near, LINK]


@compiled
def _within(states: np.ndarray, state: int, length: int) -> int:
    """The state of the last `length` tokens of a state's substrings, which have at least as many, or of all of them.

    States that end at the same places are split later on: a state that was looked up before is to be looked up again.
    """
    while state != ROOT and states[states[state, LINK], LENGTH] >= length:
        state = states[state, LINK]
    return state


@compiled
def _continuations(states, edges, state, tokens, targets, counts):
    """The most frequent ones, as many as `tokens` has room for, in falling order, equal ones by token. How many there
    are, and how often anything followed."""
    found, total = 0, 0
    edge = states[state, EDGES]
    while edge != NONE:
        token, target = edges[edge, TOKEN], edges[edge, TARGET]
        count = states[target, COUNT]
        total += count
        at = found
        while at > 0 and (counts[at - 1] < count or (counts[at - 1] == count and tokens[at - 1] > token)):
            if at < tokens.shape[0]:
                tokens[at], targets[at], counts[at] = tokens[at - 1], targets[at - 1], counts[at - 1]
            at -= 1
        if at < tokens.shape[0]:
            tokens[at], targets[at], counts[at] = token, target, count
            found = min(found + 1, tokens.shape[0])
        edge = edges[edge, NEXT]
    return found, total


@compiled
def _match(states, state, depth):
    """The state of the longest suffix that something has followed."""
    state = _within(states, state, depth - 1)
    while state != ROOT and states[state, EDGES] == NONE:
        state = states[state, LINK]
    return state


@compiled
def _paths(states, edges, state, depth, width, longest, least, tokens, chances, lengths):
    """Beam search from `state`: see SuffixAutomaton.paths. How many paths there are.

    tokens, chances [width, longest]; lengths [width].
    """
    at, ended, lengths[0] = np.full(width, state), np.zeros(width, np.bool_), 0
    alive = 1
    child_tokens, child_states = np.empty(width, np.int64), np.empty(width, np.int64)
    child_counts = np.empty(width, np.int64)
    rank_chance, rank_parent = np.empty(width), np.empty(width, np.int64)
    rank_token, rank_state = np.empty(width, np.int64), np.empty(width, np.int64)
    for step in range(longest):
        ranked = 0
        for beam in range(alive):
            chance = 1.0 if lengths[beam] == 0 else chances[beam, lengths[beam] - 1]
            grew = False
            if not ended[beam]:
                found, total = _continuations(states, edges, at[beam], child_tokens, child_states, child_counts)
                for child in range(found):
                    extended = chance * (child_counts[child] / total)
                    if extended >= least:
                        grew = True
                        ranked = _rank(rank_chance, rank_parent, rank_token, rank_state, ranked, extended, beam,
                                       child_tokens[child], child_states[child])
            if not grew and lengths[beam] > 0:
                ended[beam] = True
                ranked = _rank(rank_chance, rank_parent, rank_token, rank_state, ranked, chance, beam, NONE, NONE)
        if ranked == 0:
            return 0
        old_tokens, old_chances = tokens[:alive].copy(), chances[:alive].copy()
        old_lengths, old_ended, old_at = lengths[:alive].copy(), ended[:alive].copy(), at[:alive].copy()
        going = False
        for beam in range(ranked):
            parent = rank_parent[beam]
            tokens[beam], chances[beam] = old_tokens[parent], old_chances[parent]
            lengths[beam], ended[beam], at[beam] = old_lengths[parent], old_ended[parent], old_at[parent]
            if rank_token[beam] != NONE:
                tokens[beam, step], chances[beam, step] = rank_token[beam], rank_chance[beam]
                lengths[beam] = step + 1
                at[beam] = _within(states, rank_state[beam], depth - 1)
                going = True
        alive = ranked
        if not going:
            break
    return alive


@compiled
def _rank(chances, parents, tokens, states, ranked, chance, parent, token, state):
    """Put a candidate among the best; of equal ones the earlier stays ahead. How many there are."""
    at = ranked
    while at > 0 and chances[at - 1] < chance:
        if at < chances.shape[0]:
            chances[at], parents[at] = chances[at - 1], parents[at - 1]
            tokens[at], states[at] = tokens[at - 1], states[at - 1]
        at -= 1
    if at < chances.shape[0]:
        chances[at], parents[at], tokens[at], states[at] = chance, parent, token, state
        return min(ranked + 1, chances.shape[0])
    return ranked


@dataclass(frozen=True)
class Draft:
    """tokens: a likely continuation. chances: of each token, how often it and those before it have followed the
    matched suffix, relative to all that has followed it: never rising."""

    tokens: tuple[int, ...]
    chances: tuple[float, ...]


class SuffixAutomaton:
    """depth: substrings up to this many tokens are counted; suffixes of up to depth - 1 tokens are matched."""

    def __init__(self, depth: int = 64):
        if depth < 2:
            raise ValueError(f"depth is {depth}, expected at least 2")
        self._depth = depth
        self._sizes = np.array([1, 0], np.int64)
        self._states = np.array([[0, NONE, 0, NONE]], np.int32)
        self._edges = np.empty((0, 4), np.int32)
        self._table = np.full(1, NONE, np.int32)
        self._ends = np.empty((0, 2), np.int32)
        self.tokens = 0

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in (self._states, self._edges, self._table, self._ends))

    def add_sequence(self) -> int:
        """The number of a new, empty sequence."""
        self._ends = np.concatenate([self._ends, np.array([[ROOT, ROOT]], np.int32)])
        return len(self._ends) - 1

    def append(self, sequence: int, tokens: np.ndarray) -> None:
        """tokens: int32 [n]."""
        self._make_room(len(tokens))
        _append(self._states, self._edges, self._table, self._sizes, self._ends, sequence, tokens, self._depth)
        self.tokens += len(tokens)

    def _make_room(self, more: int) -> None:
        """An automaton of n tokens has at most 2 n states and 3 n edges."""
        tokens = self.tokens + more
        if 2 * tokens + 2 > len(self._states):
            self._states = _grown(self._states, 4 * tokens + 2)
        if 3 * tokens > len(self._edges):
            self._edges = _grown(self._edges, 6 * tokens)
            self._table = np.full(1 << (12 * tokens - 1).bit_length(), NONE, np.int32)
            _enter_all(self._edges, self._table, self._sizes[USED_EDGES])

    def draft(self, sequence: int, longest: int, least: float = 0.0) -> Draft:
        """The most likely path: see `paths`."""
        return next(iter(self.paths(sequence, 1, longest, least)), Draft((), ()))

    def paths(self, sequence: int, width: int, longest: int, least: float = 0.0) -> list[Draft]:
        """At most `width` continuations of the sequence, of at most `longest` tokens, the likeliest first.

        They continue the longest suffix that something has followed, anywhere in any sequence; none if not even the
        last token has been followed by anything. A beam search: of equally frequent tokens the smaller comes first. A
        path ends before its chance falls below `least`.
        """
        state = _match(self._states, self._ends[sequence, NEAR], self._depth)
        if state == ROOT or longest < 1:
            return []
        tokens, chances = np.empty((width, longest), np.int32), np.empty((width, longest))
        lengths = np.empty(width, np.int64)
        count = _paths(self._states, self._edges, state, self._depth, width, longest, least, tokens, chances, lengths)
        return [Draft(tuple(tokens[i, :n].tolist()), tuple(chances[i, :n].tolist()))
                for i, n in enumerate(lengths[:count].tolist())]


def warm_up() -> None:
    """Compile what is compiled, or load it: seconds the first time on a machine, and most of one in each process."""
    automaton = SuffixAutomaton(3)
    automaton.append(automaton.add_sequence(), np.array([1, 2, 1, 3, 1, 2, 1], np.int32))
    automaton.paths(0, 2, 2)


def _grown(table: np.ndarray, rows: int) -> np.ndarray:
    grown = np.empty((rows, table.shape[1]), np.int32)
    grown[: len(table)] = table
    return grown

"""Drafts of several paths as one tree of tokens, in which what the paths have in common at their beginnings is one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # which needs numba; who verifies trees does not
    from megatron_pbsd.rollout.drafting.suffix_automaton import Draft

ROOT = -1
"""Of nodes that continue the context itself, the parent."""


@dataclass(frozen=True)
class DraftTree:
    """Its nodes are numbered, parents before children.

    tokens, parents, depths: of each node; what may come right after the context has depth 1. trunk: nodes at the
    beginning each of which continues the one before: the first path.
    """

    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    depths: tuple[int, ...]
    trunk: int

    @classmethod
    def of(cls, paths: Sequence[Sequence[int]]) -> DraftTree:
        """Of paths in any number, whole. The nodes of the first, which may be all that is verified and should be the
        likeliest, come before all others."""
        if len(paths) == 1:
            return cls.line(paths[0])
        known: dict[tuple[int, int], int] = {}
        depths: list[int] = []
        for path in paths:
            at = ROOT
            for depth, token in enumerate(path, start=1):
                at = known.setdefault((at, token), len(known))
                if at == len(depths):
                    depths.append(depth)
        return cls._of([token for _, token in known], [parent for parent, _ in known], depths)

    @classmethod
    def likeliest(cls, paths: Sequence[Draft], nodes: int) -> DraftTree:
        """Of the `nodes` likeliest beginnings of all paths, each once.

        That is the tree from which most tokens are expected, as a node is accepted with the chance of its beginning,
        and whole, as chances never rise along a path.
        """
        chances = {path.tokens[: i + 1]: path.chances[i] for path in paths for i in range(len(path.tokens))}
        chosen = sorted(chances, key=lambda beginning: (-chances[beginning], len(beginning)))[:nodes]
        numbers = {beginning: node for node, beginning in enumerate(chosen)}
        return cls._of([beginning[-1] for beginning in chosen],
                       [numbers.get(beginning[:-1], ROOT) for beginning in chosen], list(map(len, chosen)))

    @classmethod
    def line(cls, path: Sequence[int]) -> DraftTree:
        """A linear draft."""
        n = len(path)
        return cls(tuple(path), tuple(range(-1, n - 1)), tuple(range(1, n + 1)), n)

    @classmethod
    def _of(cls, tokens: Sequence[int], parents: Sequence[int], depths: Sequence[int]) -> DraftTree:
        trunk = next((node for node, parent in enumerate(parents) if parent != node - 1), len(parents))
        return cls(tuple(tokens), tuple(parents), tuple(depths), trunk)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def branches(self) -> bool:
        return self.trunk < len(self.tokens)

    @property
    def depth(self) -> int:
        """Tokens of the longest path."""
        return max(self.depths, default=0) if self.branches else self.trunk

    def cut(self, depth: int) -> DraftTree:
        """As much of each path as has at most `depth` tokens."""
        if depth >= self.depth:
            return self
        if not self.branches:
            return DraftTree.line(self.tokens[:depth])
        kept = [node for node, deep in enumerate(self.depths) if deep <= depth]
        number = {node: i for i, node in enumerate(kept)} | {ROOT: ROOT}
        return DraftTree._of([self.tokens[node] for node in kept], [number[self.parents[node]] for node in kept],
                             [self.depths[node] for node in kept])

    @property
    def first_path(self) -> DraftTree:
        return DraftTree.line(self.tokens[: self.trunk]) if self.branches else self

    @cached_property
    def _children(self) -> dict[tuple[int, int], int]:
        return {edge: node for node, edge in enumerate(zip(self.parents, self.tokens))}

    def accepted(self, sampled: Sequence[int]) -> list[int]:
        """The nodes of the path that was sampled too, in its order.

        sampled: a token from the model's logits after the context, and after each node, by the random number of the
        position that it would have: that of the context's end and the node's depth. The tokens sampled after the
        context and after each accepted node are the very ones that sampling one by one gives; all others were sampled
        after tokens that were never generated. Siblings have different tokens, so that there is one such path.
        """
        path: list[int] = []
        node = self._children.get((ROOT, sampled[0])) if self.tokens else None
        while node is not None:
            path.append(node)
            node = self._children.get((node, sampled[1 + node]))
        return path

    def mask(self, slots: int) -> np.ndarray:
        """bool [slots, slots]: what each slot attends to beside the context: itself and those it follows.

        Slot 0 is the context's last token, slot i + 1 node i. What is left over follows nothing and is followed by
        nothing, so that it is never accepted.
        """
        mask = np.eye(slots, dtype=bool)
        for node, parent in enumerate(self.parents):
            mask[node + 1] |= mask[parent + 1]
        return mask

    @property
    def hidden(self) -> np.ndarray:
        """bool [nodes, nodes]: which others each node must not attend to; all but its ancestors."""
        return ~self.mask(1 + len(self))[1:, 1:]


NO_DRAFT = DraftTree((), (), (), 0)

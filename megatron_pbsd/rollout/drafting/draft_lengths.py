"""How much to draft: as much as makes a step yield most tokens per second, and nothing where drafts do not pay."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_pbsd.rollout.drafting.draft_tree import DraftTree
from megatron_pbsd.rollout.drafting.step_cost import StepCost

LINES, TREES = range(2)
"""Shapes in which drafts may be verified: their first paths alone, or all of them."""
ALLOWANCE = 0.01
"""Share of the engine's time that drafts may cost more than they bring."""
LEAST_ALLOWANCE = 0.001
"""The same, of attempts at what does not pay as far as is known, when many have failed."""
FAILED = 0.8
"""What an attempt that failed leaves of the share for further ones."""
START_STEPS = 4
"""Plain steps that may be lost before any time has passed."""
ATTEMPT_STEPS = 8
"""Plain steps that may be saved for attempts."""
LUCK_STEPS = 64
"""Plain steps that drafts have won which may be lost again: a few unlucky drafts do not end what pays."""
PLAIN_EVERY = 16
"""While drafts pay, every so many steps is one without, so that it stays known what those cost."""
LOOK_EVERY = 16
"""While they do not, every so many steps of as many sequences is looked at."""
LONG_EVERY = 4
"""One of so many attempts is as long as can be, and the next one token: only so is it seen what each draft costs and
what each token. The longest come first: from what those cost no other can cost more."""
WORTH = 0.85
"""What a token that was drafted saves, as a share of what a token costs without: less than all of it, since sequences
that end earlier leave smaller batches, which cost more per token."""
MEMORY = 0.98
"""Weight, after one more step with drafts, of what was seen before; and after PLAIN_EVERY steps without."""


class DraftLengths:
    """longest: path of a draft (γ_max). paths: of a draft, at most; 1 leaves lines as the only shape.

    Let β_i be the chance that a token is kept at a draft's depth i. A step of B sequences with drafts of depth γ yields
    B + Σ β_i tokens in T(B, γ) seconds, in which all nodes count: γ and the shape are chosen where that is most per
    second, which is the least of Seer's T_SD(B, γ) with chances per depth in place of one α for all. A token that is
    kept counts as `WORTH`.

    Trees show what their first paths would have brought, but not the other way round: while those are verified alone,
    what is known of trees fades, towards what may be hoped of them, until they are tried again.

    Drafts that win by what is known are made as long as an account is covered, to which each step adds `ALLOWANCE` of
    its seconds, and each with drafts what it saved beside the least that plain steps may cost, or takes what it lost.
    Drafts that lose by what is known are attempted within a budget, to which each step adds a share of its seconds that
    falls with each attempt that lost: what drafts win elsewhere is not spent on them.
    """

    def __init__(self, longest: int = 8, paths: int = 1):
        if longest < 1 or paths < 1:
            raise ValueError(f"longest draft is {longest}, of {paths} paths, expected at least 1 each")
        self.longest, self._shapes = longest, (LINES,) if paths == 1 else (LINES, TREES)
        self.cost = StepCost()
        # Of steps with drafts: sequences; by shape and depth drafts that reach it, nodes there, how often all before
        # was kept, and how often that was too.
        self._sequences = 0.0
        self._reaching, self._nodes, self._tried, self._kept = np.zeros((4, len(self._shapes), longest))
        self._shape = self._shapes[-1]
        self.chances = self._chances()
        self._account = self._budget = 0.0
        self._share = ALLOWANCE
        self._attempting = False
        self._attempts = self._since_plain = self._since_drafts = 0
        # Sequences of the latest step that was looked at and had no drafts, and how many steps ago that was.
        self._declined, self._rested = 0, 0

    def _chances(self) -> np.ndarray:
        """β, float [shapes, longest]: never rising. Depths that lines never had count as the one before them, and trees
        that were not tried as if they kept half of what lines lose."""
        last, conditional = 1.0, []
        for tried, kept in zip(self._tried[LINES].tolist(), self._kept[LINES].tolist()):
            last = (kept + last) / (tried + 1.0)
            conditional.append(last)
        shapes = [np.array(conditional)]
        if TREES in self._shapes:
            shapes.append((self._kept[TREES] + (1.0 + shapes[LINES]) / 2) / (self._tried[TREES] + 1.0))
        return np.cumprod(shapes, axis=1)

    def rests(self, sequences: int) -> bool:
        """Whether the next step of so many sequences has no drafts, and need not be looked at. Call `rested` after."""
        return sequences == self._declined and self._rested < LOOK_EVERY

    def rested(self, seconds: float) -> None:
        """Of a step that was not looked at."""
        self._rested += 1
        self._since_drafts += 1
        self._account += ALLOWANCE * seconds
        self._budget += self._share * seconds

    def worthwhile(self, sequences: int, reads: Sequence[int]) -> bool:
        """Whether to make drafts for the next step of so many sequences. reads: see StepCost."""
        self._declined = 0
        if not self.cost.knows_plain or self._since_plain >= PLAIN_EVERY:
            return False
        expected = np.stack([self._reaching, self._nodes]) * (sequences / max(self._sequences, 1.0))
        best, losses = self._losses(expected, sequences, reads, sequences)
        self._attempting = bool(losses[best] > 0.0)
        if self._account < 0.0 or (self._attempting and self._budget < losses[self._next(best)]):
            self._declined = sequences
            return False
        return True

    def choose(self, available: Sequence[DraftTree], sequences: int, reads: Sequence[int]) -> list[DraftTree]:
        """What to verify of each draft."""
        drafts = self._by_depth(available)
        if not drafts.any():
            return list(available)
        self._shape, longest = self._next(self._losses(drafts, sequences, reads, len(available))[0])
        return [(draft if self._shape == TREES else draft.first_path).cut(longest + 1) for draft in available]

    def _by_depth(self, drafts: Sequence[DraftTree]) -> np.ndarray:
        """float [2, shapes, longest]: how many drafts reach each depth, and how many nodes they have there."""
        depths = np.arange(self.longest)[:, None]
        lines = (np.array([draft.trunk for draft in drafts]) > depths).sum(1)
        if TREES not in self._shapes:
            return np.array([[lines], [lines]], float)
        trees = (np.array([draft.depth for draft in drafts]) > depths).sum(1)
        nodes = np.bincount([depth for draft in drafts for depth in draft.depths], minlength=self.longest + 1)
        return np.array([[lines, trees], [lines, nodes[1:]]], float)

    def _next(self, best: tuple[int, int]) -> tuple[int, int]:
        """Shape of the next drafts, and their depth less one. best: with which most is made of the next step."""
        turn = self.cost.draft_steps % LONG_EVERY
        if not self._attempting or turn > 1:
            return best
        return LINES, 0 if turn else self.longest - 1

    def _losses(
        self, drafts: np.ndarray, sequences: int, reads: Sequence[int], attempts: int
    ) -> tuple[tuple[int, int], np.ndarray]:
        """With which shape, and which depth less one, most is made of the next step; and the seconds, float64 [shapes,
        longest], that each of them loses beside a plain step.

        drafts: see `_by_depth`, of so many attempts.
        """
        reaching, nodes = drafts
        plain = self.cost.plain(sequences, reads)
        if not self.cost.draft_steps:
            return (LINES, self.longest - 1), np.full(nodes.shape, plain)
        seconds = self.cost.extra(attempts, nodes.cumsum(1))
        yields = WORTH * (reaching * self.chances).cumsum(1)
        speeds = (sequences + yields) / np.maximum(plain + seconds, 1e-9)
        each = self.cost.plain(sequences, ()) / sequences
        return divmod(int(speeds.argmax()), self.longest), seconds - each * yields

    def available(self, sequences: int, drafts: Sequence[DraftTree]) -> None:
        """Of a step for which drafts were made: as they were before `choose` cut them."""
        self._attempts = len(drafts)
        self._sequences = MEMORY * self._sequences + sequences
        for seen, now in zip((self._reaching, self._nodes), self._by_depth(drafts)):
            seen *= MEMORY
            seen += now

    def observe(
        self, sequences: int, reads: Sequence[int], drafts: Sequence[DraftTree], kept: Sequence[Sequence[int]],
        seconds: float,
    ) -> None:
        """Of a step that was looked at: what was verified, empty drafts included, and which nodes of each were kept."""
        attempts, self._attempts = self._attempts, 0
        knew, tokens = self.cost.knows_plain, sum(map(len, drafts))
        seconds = self.cost.observe(sequences, reads, attempts, tokens, seconds)
        self._rested = 0
        if not self.cost.knows_plain:
            return
        step = self.cost.plain(sequences, ())
        if not knew:
            self._account = self._budget = START_STEPS * step
        self._account += ALLOWANCE * seconds
        self._budget += self._share * seconds
        if attempts:
            each = self.cost.least(sequences, ()) / sequences
            self._settle(self.cost.least(sequences, reads) + WORTH * sum(map(len, kept)) * each - seconds)
        self._account = min(self._account, LUCK_STEPS * step)
        self._budget = min(self._budget, ATTEMPT_STEPS * step)
        if tokens:
            self._learn(drafts, kept)
        self._since_plain = self._since_plain + 1 if attempts else 0
        self._since_drafts = 0 if attempts else self._since_drafts + 1

    def _settle(self, won: float) -> None:
        """won: seconds, by a step with drafts. What the first lost could not be foreseen and is not made up for."""
        if self.cost.draft_steps == 1:
            won = max(won, -self._account)
        self._account += won
        if self._attempting:
            self._budget += min(won, 0.0)
            self._share = ALLOWANCE if won > 0 else max(FAILED * self._share, LEAST_ALLOWANCE)

    def _learn(self, drafts: Sequence[DraftTree], kept: Sequence[Sequence[int]]) -> None:
        fading = MEMORY ** (1 + self._since_drafts / PLAIN_EVERY)
        self._tried *= fading
        self._kept *= fading
        self._count(LINES, [draft.trunk for draft in drafts],
                    [sum(node < draft.trunk for node in nodes) for draft, nodes in zip(drafts, kept)])
        if self._shape == TREES:
            self._count(TREES, [draft.depth for draft in drafts], [len(nodes) for nodes in kept])
        self.chances = self._chances()

    def _count(self, shape: int, lengths: Sequence[int], kept: Sequence[int]) -> None:
        depths = np.arange(self.longest)[:, None]
        lengths, kept = np.array(lengths), np.array(kept)
        self._tried[shape] += ((lengths > depths) & (kept >= depths)).sum(1)
        self._kept[shape] += (kept > depths).sum(1)

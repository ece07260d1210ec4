"""How many tokens to draft: as many as make a step yield most tokens per second, and none where drafts do not pay."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_pbsd.rollout.drafting.step_cost import StepCost

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
    """longest: of a draft (γ_max).

    Let β_i be the chance that a draft's i-th token is kept. A step of B sequences with drafts of γ tokens yields
    B + Σ β_i tokens in T(B, γ) seconds: γ is chosen where that is most per second, which is the least of Seer's
    T_SD(B, γ) with chances per position in place of one α for all. A token that is kept counts as `WORTH`.

    Drafts that win by what is known are made as long as an account is covered, to which each step adds `ALLOWANCE` of
    its seconds, and each with drafts what it saved beside the least that plain steps may cost, or takes what it lost.
    Drafts that lose by what is known are attempted within a budget, to which each step adds a share of its seconds that
    falls with each attempt that lost: what drafts win elsewhere is not spent on them.
    """

    def __init__(self, longest: int = 8):
        if longest < 1:
            raise ValueError(f"longest draft is {longest}, expected at least 1")
        self.longest = longest
        self.cost = StepCost()
        # By position, of steps with drafts: sequences, drafts that reached it with all before kept, and kept there.
        self._sequences = 0.0
        self._reaching, self._tried, self._kept = np.zeros((3, longest))
        self.chances = self._chances()
        self._account = self._budget = 0.0
        self._share = ALLOWANCE
        self._attempting = False
        self._attempts = self._since_plain = self._since_drafts = 0
        # Sequences of the latest step that was looked at and had no drafts, and how many steps ago that was.
        self._declined, self._rested = 0, 0

    def _chances(self) -> np.ndarray:
        """β, float [longest]: never rising. Positions that were never tried count as the one before them."""
        last, conditional = 1.0, []
        for tried, kept in zip(self._tried.tolist(), self._kept.tolist()):
            last = (kept + last) / (tried + 1.0)
            conditional.append(last)
        return np.cumprod(conditional)

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
        reaching = self._reaching * (sequences / max(self._sequences, 1.0))
        best, losses = self._losses(reaching, sequences, reads, sequences)
        self._attempting = bool(losses[best] > 0.0)
        if self._account < 0.0 or (self._attempting and self._budget < losses[self._length(best) - 1]):
            self._declined = sequences
            return False
        return True

    def choose(self, available: Sequence[int], sequences: int, reads: Sequence[int]) -> list[int]:
        """How much of each draft to verify. available: tokens of each draft."""
        available = [min(n, self.longest) for n in available]
        reaching = np.array([sum(n > i for n in available) for i in range(self.longest)], float)
        if not reaching[0]:
            return [0] * len(available)
        best, _ = self._losses(reaching, sequences, reads, len(available))
        length = self._length(best)
        return [min(n, length) for n in available]

    def _length(self, best: int) -> int:
        """best: index of the length with which most is made of the next step."""
        turn = self.cost.draft_steps % LONG_EVERY
        if not self._attempting or turn > 1:
            return best + 1
        return 1 if turn else self.longest

    def _losses(
        self, reaching: np.ndarray, sequences: int, reads: Sequence[int], attempts: int
    ) -> tuple[int, np.ndarray]:
        """With which length, from 1 on, most is made of the next step; and the seconds, float64 [longest], that each of
        them loses beside a plain step.

        reaching: how many drafts have each position, of so many attempts.
        """
        plain = self.cost.plain(sequences, reads)
        if not self.cost.draft_steps:
            return self.longest - 1, np.full(self.longest, plain)
        seconds = self.cost.extra(attempts, reaching.cumsum())
        yields = WORTH * (reaching * self.chances).cumsum()
        best = int(((sequences + yields) / np.maximum(plain + seconds, 1e-9)).argmax())
        each = self.cost.plain(sequences, ()) / sequences
        return best, seconds - each * yields

    def available(self, sequences: int, lengths: Sequence[int]) -> None:
        """Of a step for which drafts were made: how long they were, before `choose` cut them."""
        self._attempts = len(lengths)
        self._sequences = MEMORY * self._sequences + sequences
        self._reaching *= MEMORY
        self._reaching += (np.array(lengths)[None, :] > np.arange(self.longest)[:, None]).sum(1)

    def observe(
        self, sequences: int, reads: Sequence[int], drafted: Sequence[int], kept: Sequence[int], seconds: float
    ) -> None:
        """Of a step that was looked at: lengths of its drafts, empty ones included, and how much was kept of each."""
        attempts, self._attempts = self._attempts, 0
        knew, tokens = self.cost.knows_plain, sum(drafted)
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
            self._settle(self.cost.least(sequences, reads) + WORTH * sum(kept) * each - seconds)
        self._account = min(self._account, LUCK_STEPS * step)
        self._budget = min(self._budget, ATTEMPT_STEPS * step)
        if tokens:
            self._learn(drafted, kept)
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

    def _learn(self, drafted: Sequence[int], kept: Sequence[int]) -> None:
        positions = np.arange(self.longest)[:, None]
        lengths, agreed = np.array(drafted), np.array(kept)
        reached = (lengths > positions) & (agreed >= positions)
        fading = MEMORY ** (1 + self._since_drafts / PLAIN_EVERY)
        for seen, now in ((self._tried, reached), (self._kept, agreed > positions)):
            seen *= fading
            seen += now.sum(1)
        self.chances = self._chances()

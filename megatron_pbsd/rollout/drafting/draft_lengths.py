"""How many tokens to draft: as many as make a step yield most tokens per second, and none where drafts do not pay."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_pbsd.rollout.drafting.step_cost import StepCost

ALLOWANCE = 0.01
"""Share of the engine's time that drafts may cost more than they bring: what finding out about them may cost."""
PLAIN_EVERY = 16
"""While drafts pay, every so many steps is one without, so that it stays known what those cost."""
LOOK_EVERY = 8
"""Steps without drafts are looked at this often once their cost is well known: a look takes as long as a draft."""
WELL_KNOWN = 64
"""Plain steps that make their cost well known."""
SAVED_STEPS = 8
"""What drafts have won counts as allowance for later ones up to so many plain steps."""
WORTH = 0.85
"""What a token that was drafted saves, as a share of what a token costs without: less than all of it, since sequences
that end earlier leave smaller batches, which cost more per token."""
TRIED = (1, 2, 4, 8)
"""Lengths of drafts that are made to find out about them."""
MEMORY = 0.98
"""Weight, after one more step with drafts, of what was seen before."""


class DraftLengths:
    """longest: of a draft (γ_max). priority: how much more a probe's token counts than another's (λ).

    Let β_i be the chance that a draft's i-th token is kept. A step of B sequences with drafts of γ tokens yields
    B + Σ β_i tokens in T(B, γ) seconds: γ is chosen where that is most per second, which is the least of Seer's
    T_SD(B, γ) with chances per position in place of one α for all. The tokens so found are handed out one by one to
    the class, probes or others, with the larger benefit, a probe's counted `priority` times.

    Whether drafts are made at all is a matter of account: each step adds `ALLOWANCE` of its seconds; one with drafts
    adds what it saved, or takes what it lost, by the least that plain steps may cost. A step that is expected to lose
    more than is there has no drafts.
    """

    def __init__(self, longest: int = 8, priority: float = 2.0):
        if longest < 1:
            raise ValueError(f"longest draft is {longest}, expected at least 1")
        self.longest, self._priority = longest, priority
        self.cost = StepCost()
        # By position, of steps with drafts: sequences, drafts that reached it with all before kept, and kept there.
        self._sequences = 0.0
        self._reaching, self._tried, self._kept = np.zeros((3, longest))
        self._account = 0.0
        self._since_plain = self._unseen = self._attempts = 0
        # Of the next step with drafts, until there is a further look: seconds that it is expected to lose.
        self._loss = 0.0

    @property
    def chances(self) -> np.ndarray:
        """β, float [longest]: never rising. Positions that were never tried count as the one before them."""
        last, conditional = 0.5, []
        for tried, kept in zip(self._tried, self._kept):
            last = (kept + last) / (tried + 1.0)
            conditional.append(last)
        return np.cumprod(conditional)

    def worthwhile(self, sequences: int, reads: Sequence[int]) -> bool:
        """Whether to make drafts for the next step of so many sequences. reads: see StepCost."""
        if not self.cost.knows_plain or self._since_plain >= PLAIN_EVERY or self._account < 0.0:
            return False
        if self._unseen == 0:
            reaching = self._reaching * (sequences / max(self._sequences, 1.0))
            _, self._loss = self._length(reaching, sequences, reads, sequences)
        return self._account >= self._loss

    def choose(
        self, available: Sequence[int], probes: Sequence[bool], sequences: int, reads: Sequence[int]
    ) -> list[int]:
        """How much of each draft to verify. available: tokens of each draft; probes: whose they are."""
        available = [min(n, self.longest) for n in available]
        reaching = np.array([sum(n > i for n in available) for i in range(self.longest)], float)
        if not reaching[0]:
            return [0] * len(available)
        length, _ = self._length(reaching, sequences, reads, len(available))
        budget = sum(min(n, length) for n in available)
        lengths = {True: 0, False: 0}
        chances = np.append(self.chances, 0.0)
        spent = 0
        while spent < budget:
            more = {kind: sum(n > lengths[kind] for n, probe in zip(available, probes) if probe == kind)
                    for kind in lengths}
            kind = max((k for k in lengths if more[k]),
                       key=lambda k: (self._priority if k else 1.0) * chances[lengths[k]])
            spent += more[kind]
            lengths[kind] += 1
        return [min(n, lengths[probe]) for n, probe in zip(available, probes)]

    def _length(self, reaching: np.ndarray, sequences: int, reads: Sequence[int], attempts: int) -> tuple[int, float]:
        """How long the next step's drafts should be, and the seconds that it then loses beside a plain one.

        reaching: how many drafts have each position, of so many attempts. Drafts of which little is known, or that do
        not pay as far as is known, are made of one length after the other: only so it is seen what each of them costs
        and what each of their tokens.
        """
        plain, steps = self.cost.plain(sequences, reads), self.cost.draft_steps
        if not steps:
            return 1, plain
        yields = np.cumsum(reaching * self.chances)
        seconds = np.array([self.cost.extra(attempts, tokens) for tokens in np.cumsum(reaching)])
        losses = seconds - WORTH * yields * self.cost.plain(sequences, ()) / sequences
        best = int(np.argmax((sequences + yields) / np.maximum(plain + seconds, 1e-9)))
        if steps < len(TRIED) or losses[best] > 0:
            best = min(TRIED[steps % len(TRIED)], self.longest) - 1
        return best + 1, float(losses[best])

    def observe(
        self, sequences: int, reads: Sequence[int], drafted: Sequence[int], kept: Sequence[int], seconds: float
    ) -> None:
        """Of a step: lengths of its drafts, empty ones included, and how much was kept of each."""
        attempts, self._attempts = self._attempts, 0
        self._account += ALLOWANCE * seconds
        self._since_plain = self._since_plain + 1 if attempts else 0
        well_known = self.cost.plain_steps >= WELL_KNOWN and not attempts
        self._unseen = (self._unseen + 1) % LOOK_EVERY if well_known else 0
        if self._unseen:
            return
        tokens = sum(drafted)
        seconds = self.cost.counted(sequences, reads, attempts, tokens, seconds)
        if self.cost.knows_plain:
            if attempts:
                saved = WORTH * sum(kept) * self.cost.least(sequences, ()) / sequences
                self._account -= seconds - self.cost.least(sequences, reads) - saved
            self._account = min(self._account, SAVED_STEPS * self.cost.plain(sequences, ()))
        self.cost.observe(sequences, reads, attempts, tokens, seconds)
        if tokens:
            self._learn(sequences, drafted, kept)

    def _learn(self, sequences: int, drafted: Sequence[int], kept: Sequence[int]) -> None:
        positions = np.arange(self.longest)[:, None]
        lengths, agreed = np.array(drafted), np.array(kept)
        reached = (lengths > positions) & (agreed >= positions)
        for seen, now in ((self._tried, reached), (self._kept, agreed > positions)):
            seen *= MEMORY
            seen += now.sum(1)

    def available(self, sequences: int, lengths: Sequence[int]) -> None:
        """Of a step for which drafts were made: how long they were, before `choose` cut them."""
        self._attempts = len(lengths)
        self._sequences = MEMORY * self._sequences + sequences
        self._reaching *= MEMORY
        self._reaching += (np.array(lengths)[None, :] > np.arange(self.longest)[:, None]).sum(1)

"""How many tokens a step yields with grouped speculative decoding, and how long drafts should be."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import cache
from itertools import pairwise

from megatron_pbsd.simulation.cost import CostModel

ACCEPTED = ((0, 1.70), (1, 2.04), (5, 2.32), (15, 2.53))
"""Mean tokens per verified draft, bonus token included, by number of sibling references; linear drafts (Seer,
arXiv 2511.14617)."""
LONGEST_DRAFT = 8


@cache
def acceptance(siblings: int) -> float:
    """Chance that a drafted token is accepted after those before it, with which drafts of `LONGEST_DRAFT` tokens yield
    what was measured; between measurements linear in log(1 + siblings)."""
    points = [(math.log1p(n), accepted) for n, accepted in ACCEPTED]
    x = min(math.log1p(siblings), points[-1][0])
    (x0, y0), (x1, y1) = next(pair for pair in pairwise(points) if x <= pair[1][0])
    wanted = y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _yield(middle, LONGEST_DRAFT) < wanted else (low, middle)
    return low


def _yield(chance: float, draft: int) -> float:
    """1 + chance + chance² + …: the tokens before the first rejection, and the one that replaces it."""
    return sum(chance ** i for i in range(draft + 1))


class Speculation:
    @staticmethod
    @cache
    def tokens_per_step(siblings: int, draft: int) -> float:
        return _yield(acceptance(siblings), draft)

    def best_draft(self, cost: CostModel, siblings: Sequence[int], kv: float) -> int:
        """The draft length at which the batch yields most tokens per second; longer as long as that pays."""
        counts = Counter(siblings)

        def speed(draft: int) -> float:
            tokens = sum(count * self.tokens_per_step(n, draft) for n, count in counts.items())
            return tokens / cost.seconds(1, len(siblings) * (1 + draft), kv, 0)

        best = 0
        while best < LONGEST_DRAFT and speed(best + 1) > speed(best):
            best += 1
        return best

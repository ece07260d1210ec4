"""From the lengths of a batch's sequences to each data-parallel rank's micro-batches, balanced by cost. Pure numpy.

Ranks add up gradients once a step, so a step lasts as long as the rank with the most work: the makespan. Where experts
are divided over data-parallel ranks these wait for each other in every micro-batch, and it lasts as long as the
costliest micro-batch of each index together: the synchronised makespan. One is minimised, then the other as far as
that allows, with few micro-batches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_pbsd.learner.cost import Cost
from megatron_pbsd.learner.errors import LearnerError
from megatron_pbsd.learner.packed import end_to_end
from megatron_pbsd.learner.padded import in_rectangles

MicroBatches = list[list[list[int]]]


@dataclass(frozen=True)
class Plan:
    """micro_batches:  indices of sequences by rank and micro-batch; all ranks have equally many, some may be empty.
    positions:      int64 [ranks, micro-batches], padding included.
    costs:          float64 [ranks, micro-batches], padding included.
    tokens:         positions of all sequences without padding.
    bound:          no plan's makespan is smaller: the mean cost of a rank, or the cost of the longest sequence.
    """

    micro_batches: MicroBatches
    positions: np.ndarray
    costs: np.ndarray
    tokens: int
    bound: float

    @property
    def padding_waste(self) -> float:
        """Share of positions that are padding."""
        return 1 - self.tokens / int(self.positions.sum())

    @property
    def rank_costs(self) -> np.ndarray:
        """[ranks]"""
        return self.costs.sum(axis=1)

    @property
    def makespan(self) -> float:
        """Cost of the rank with the most work."""
        return float(self.rank_costs.max())

    @property
    def synchronised_makespan(self) -> float:
        """The same if ranks wait for each other after every micro-batch."""
        return float(self.costs.max(axis=0).sum())


def plan(
    lengths: Sequence[int], ranks: int, budget: int, cost: Cost, *,
    multiple: int = 1, micro_batch_multiple: int = 1, padded: bool = False, synchronised: bool = False,
) -> Plan:
    """Divide sequences over data-parallel ranks and micro-batches.

    lengths:   positions of each sequence (its tokens less one); a sequence takes at least one.
    budget:    most positions of a micro-batch on one data-parallel rank, all its context-parallel ranks together.
    multiple:  each sequence is padded to a multiple of this.
    micro_batch_multiple:  micro-batches per rank are a multiple of this.
    padded:    micro-batches are rectangles, each sequence padded to the longest; otherwise sequences are laid end to
               end.
    synchronised:  minimise the synchronised makespan rather than the makespan.

    Unless `synchronised`, the makespan is never larger than with Karmarkar-Karp on positions or first-fit-decreasing,
    and packed at most 4/3 - 1/(3 ranks) of the optimum. The same lengths in another order give the same plan up to
    their names, and every rank may plan for itself: all processors give the same.

    LearnerError when there is no sequence, or one is longer than the budget.
    """
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    widths = padded_widths([lengths[i] for i in order], multiple)
    if not len(widths):
        raise LearnerError("a batch without sequences cannot be divided into micro-batches")
    if widths[0] > budget:
        raise LearnerError(
            f"learner.micro_batch_tokens * learner.parallel.cp = {budget} is less than the {widths[0]} positions of "
            f"the longest sequence ({lengths[order[0]]}, padded to a multiple of {multiple}); it must be at least "
            f"{widths[0]}")
    divide = in_rectangles if padded else end_to_end
    found = divide(widths, exact(cost(widths.astype(float))), ranks, budget, micro_batch_multiple, synchronised)
    named = [[sorted(order[part].tolist()) for part in rank] for rank in found]
    return measure(named, lengths, cost, multiple=multiple, padded=padded)


def padded_widths(lengths: Sequence[int], multiple: int) -> np.ndarray:
    """int64 [sequences]: positions of each by itself, padded to `multiple`."""
    return -(-np.maximum(np.asarray(lengths, dtype=np.int64), 1) // multiple) * multiple


def exact(costs: np.ndarray) -> np.ndarray:
    """In units so small that whole numbers are precise, yet n times the largest is below 2^53: sums of those are exact
    and so do not depend on their order, which is the processor's."""
    _, exponent = math.frexp(len(costs) * float(costs.max()))
    return np.rint(np.ldexp(costs, 52 - exponent))


def measure(
    micro_batches: MicroBatches, lengths: Sequence[int], cost: Cost, *, multiple: int = 1, padded: bool = False
) -> Plan:
    """What these micro-batches hold and cost. Empty ones count as nothing."""
    widths = padded_widths(lengths, multiple)
    costs = cost(widths.astype(float))

    def over(values: np.ndarray, part: list[int]) -> float:
        return (len(part) * values[part].max() if padded else values[part].sum()) if part else 0

    return Plan(
        micro_batches=micro_batches,
        positions=np.array([[over(widths, part) for part in rank] for rank in micro_batches], dtype=np.int64),
        costs=np.array([[over(costs, part) for part in rank] for rank in micro_batches], dtype=np.float64),
        tokens=int(sum(lengths)),
        bound=max(float(costs.sum()) / len(micro_batches), float(costs.max())))

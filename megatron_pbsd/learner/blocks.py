"""Micro-batches whose sequences take as many data-parallel ranks as they need (dynamic context parallelism). Pure.

A block is 1, 2, 4, … neighbouring ranks that share a micro-batch: its first rank is a multiple of its size, so that
two blocks are either apart or one within the other. Every rank works through its blocks widest first. All ranks of a
block have then the same micro-batches behind them: they come to it with the same index and at the same time, wait
neither for each other nor in a circle, and a step lasts as long as the rank with the most work.

Megatron-core 0.16.1 has a schedule of its own for this, of one sequence per forward pass on GPUs only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_pbsd.learner.balance import padded_widths
from megatron_pbsd.learner.cost import Cost
from megatron_pbsd.learner.errors import LearnerError
from megatron_pbsd.learner.microbatch import Shape
from megatron_pbsd.learner.packed import first_fit


@dataclass(frozen=True)
class Share:
    """One of a rank's micro-batches: these sequences, in ascending order, divided over `size` ranks."""

    sequences: tuple[int, ...] = ()
    size: int = 1


@dataclass(frozen=True)
class BlockPlan:
    """shares:  by rank and micro-batch; all ranks have equally many, some may be empty.
    costs:   float64 [ranks], of what each rank holds, padding of sequences included.
    """

    shares: list[list[Share]]
    costs: np.ndarray

    @property
    def makespan(self) -> float:
        """Cost of the rank with the most work."""
        return float(self.costs.max())


def plan_blocks(lengths: Sequence[int], ranks: int, tokens: int, cost: Cost, shape: Shape) -> BlockPlan:
    """Divide sequences over data-parallel ranks and micro-batches.

    lengths:  positions of each sequence (its tokens less one); a sequence takes at least one.
    ranks:    a power of two.
    tokens:   most positions that one rank holds in one micro-batch.
    shape:    of a micro-batch on one rank, packed.

    A sequence takes the least ranks that can hold it, so that a block of several ranks holds one: it needs more than
    half of the room. Block sizes descend; each sequence, the longest first, goes to the block of its size with the
    least work so far (list scheduling, Graham 1966), so that the makespan is at most the mean cost of a rank plus the
    largest cost that one sequence is to one rank. The same lengths in another order give the same plan up to their
    names, and every rank may plan for itself.

    LearnerError when there is no sequence, or one is too long for all ranks together.
    """
    if not len(lengths):
        raise LearnerError("a batch without sequences cannot be divided into micro-batches")
    shapes = {size: replace(shape, cp=size) for size in block_sizes(ranks)}
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    widths = {size: padded_widths(lengths, each.granule) for size, each in shapes.items()}
    room = {size: tokens * size // each.row_multiple * each.row_multiple for size, each in shapes.items()}
    sizes = np.select([widths[size] <= room[size] for size in shapes], list(shapes), default=0)
    if not sizes.all():
        raise _too_long(lengths, int(order[0]), tokens, shapes)
    costs = np.zeros(ranks)
    shares: list[list[Share]] = [[] for _ in range(ranks)]
    for size in reversed(shapes):
        members: list[list[int]] = [[] for _ in range(ranks // size)]
        each = cost(widths[size].astype(float)) / size
        for i in order[sizes[order] == size].tolist():
            block = int(np.argmin(costs[::size]))  # all ranks of a block have the same work so far
            members[block].append(i)
            costs[block * size : (block + 1) * size] += each[i]
        for block, mine in enumerate(members):
            for part in first_fit(widths[size][mine], room[size]):
                for rank in range(block * size, (block + 1) * size):
                    shares[rank].append(Share(tuple(sorted(mine[k] for k in part)), size))
    count = max(map(len, shares))
    return BlockPlan([rank + [Share()] * (count - len(rank)) for rank in shares], costs)


def block_sizes(ranks: int) -> list[int]:
    """1, 2, 4, … `ranks`, which is a power of two."""
    return [1 << exponent for exponent in range(ranks.bit_length())]


def _too_long(lengths: Sequence[int], longest: int, tokens: int, shapes: dict[int, Shape]) -> LearnerError:
    ranks, length = max(shapes), lengths[longest]
    least = min(-(-length // shape.row_multiple) * shape.row_multiple // size for size, shape in shapes.items())
    return LearnerError(
        f"learner.micro_batch_tokens = {tokens} on each of {ranks} data-parallel ranks is too little for the longest "
        f"sequence, of {length} positions; it must be at least {least}")

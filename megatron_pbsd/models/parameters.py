"""Where the elements of Hugging Face tensors lie in the parameters of each Megatron rank. Pure data.

Import, export, weight publication and checkpoint conversion all read the same map.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_pbsd.config import ParallelConfig

Index = tuple[slice, ...]


@dataclass(frozen=True)
class RankCoordinates:
    """Place of a rank in the tensor-, data- and pipeline-parallel dimensions."""

    tp: int
    dp: int
    pp: int


@dataclass(frozen=True)
class Piece:
    """local[local_index] == hf[hf_index], with `local` the rank's parameter and `hf` the tensor `hf_name`.

    primary: of all ranks that hold these elements, this one speaks for them: over all ranks, the primary pieces
    cover every element of every Hugging Face tensor exactly once.
    """

    hf_name: str
    hf_index: Index
    local_index: Index
    primary: bool

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(s.stop - s.start for s in self.hf_index)


ParameterMap = Mapping[str, list[Piece]]


@dataclass(frozen=True)
class Placement:
    """Makes pieces for one rank. shapes: of the Hugging Face tensors. tp: tensor-parallel size."""

    shapes: Mapping[str, tuple[int, ...]]
    tp: int
    at: RankCoordinates

    def share(self, length: int) -> slice:
        """This rank's 1/tp of a dimension."""
        each = length // self.tp
        return slice(self.at.tp * each, (self.at.tp + 1) * each)

    def whole(self, name: str) -> list[Piece]:
        """A tensor that every tensor-parallel rank holds in full."""
        index = tuple(slice(0, n) for n in self.shapes[name])
        return [Piece(name, index, index, primary=self.at.dp == 0 and self.at.tp == 0)]

    def part(self, name: str, dim: int, primary: bool = True) -> list[Piece]:
        """A matrix divided along `dim`: 0 column parallel, 1 row parallel (Megatron's words for y = Wx)."""
        shape = self.shapes[name]
        share = self.share(shape[dim])
        hf_index = tuple(share if d == dim else slice(0, n) for d, n in enumerate(shape))
        local_index = tuple(slice(0, s.stop - s.start) for s in hf_index)
        return [Piece(name, hf_index, local_index, primary and self.at.dp == 0)]

    def stacked(self, rows: list[tuple[str, slice]]) -> list[Piece]:
        """A local matrix whose rows are these rows of these tensors, in order."""
        made, start = [], 0
        for name, span in rows:
            columns = slice(0, self.shapes[name][1])
            stop = start + span.stop - span.start
            made.append(Piece(name, (span, columns), (slice(start, stop), columns), self.at.dp == 0))
            start = stop
        return made


def coordinates(parallel: ParallelConfig, rank: int) -> RankCoordinates:
    """Megatron-core's order of ranks: tensor parallel fastest, then data parallel, then pipeline."""
    return RankCoordinates(
        tp=rank % parallel.tp,
        dp=rank // parallel.tp % parallel.dp,
        pp=rank // (parallel.tp * parallel.dp))


def local_shape(pieces: list[Piece]) -> tuple[int, ...]:
    """Shape of the parameter that these pieces tile."""
    return tuple(max(p.local_index[d].stop for p in pieces) for d in range(len(pieces[0].local_index)))

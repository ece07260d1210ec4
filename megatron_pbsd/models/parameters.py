"""Where the elements of Hugging Face tensors lie in the parameters of each Megatron rank. Pure data.

Import, export, weight publication and checkpoint conversion all read the same map.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from megatron_pbsd.config import ParallelConfig

Index = tuple[slice, ...]


@dataclass(frozen=True)
class RankCoordinates:
    """Place of a rank. Its attention and dense layers lie at (tp, cp, dp, pp), its experts at (etp, ep, expert_dp, pp):
    the same ranks, divided in two ways."""

    tp: int
    cp: int
    dp: int
    pp: int
    etp: int
    ep: int
    expert_dp: int


@dataclass(frozen=True)
class Piece:
    """local[local_index] == hf[hf_index], with `local` the rank's parameter and `hf` the tensor `hf_name`.

    primary: of all ranks that hold these elements, this one speaks for them: over all ranks, the primary pieces
    cover every element of every Hugging Face tensor exactly once.
    padding: rows of `local` after these that stand for nothing. They are 0 and stay 0.
    """

    hf_name: str
    hf_index: Index
    local_index: Index
    primary: bool
    padding: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(s.stop - s.start for s in self.hf_index)


ParameterMap = Mapping[str, list[Piece]]


@dataclass(frozen=True)
class Placement:
    """Makes pieces of tensors that `size` ranks divide, for the one of them that is `rank`.

    shapes:  of the Hugging Face tensors.
    primary: of the ranks that hold the same share, this one speaks for it.
    """

    shapes: Mapping[str, tuple[int, ...]]
    rank: int
    size: int
    primary: bool

    def share(self, length: int) -> slice:
        """This rank's part of a dimension."""
        each = length // self.size
        return slice(self.rank * each, (self.rank + 1) * each)

    def whole(self, name: str) -> list[Piece]:
        """A tensor that each of the ranks holds in full."""
        index = tuple(slice(0, n) for n in self.shapes[name])
        return [Piece(name, index, index, self.primary and self.rank == 0)]

    def part(self, name: str, dim: int) -> list[Piece]:
        """A matrix divided along `dim`: 0 column parallel, 1 row parallel (Megatron's words for y = Wx)."""
        shape = self.shapes[name]
        share = self.share(shape[dim])
        hf_index = tuple(share if d == dim else slice(0, n) for d, n in enumerate(shape))
        local_index = tuple(slice(0, s.stop - s.start) for s in hf_index)
        return [Piece(name, hf_index, local_index, self.primary)]

    def vocabulary(self, name: str, primary: bool = True) -> list[Piece]:
        """A matrix with a row for each token, divided into equal shares: the last one is padded."""
        rows, columns = self.shapes[name]
        each = padded_vocabulary(rows, self.size) // self.size
        span = slice(self.rank * each, min((self.rank + 1) * each, rows))
        count = span.stop - span.start
        index = (span, slice(0, columns)), (slice(0, count), slice(0, columns))
        return [Piece(name, *index, primary and self.primary, padding=each - count)]

    def stacked(self, rows: list[tuple[str, slice]]) -> list[Piece]:
        """A local matrix or vector whose rows are these rows of these tensors, in order."""
        made, start = [], 0
        for name, span in rows:
            columns = tuple(slice(0, n) for n in self.shapes[name][1:])
            stop = start + span.stop - span.start
            made.append(Piece(name, (span, *columns), (slice(start, stop), *columns), self.primary))
            start = stop
        return made


def paired(piece: Piece, plain: int) -> list[Piece]:
    """A piece of rows, of which those after the first `plain` are two halves: in `local` row i of the one is followed
    by row i of the other."""
    (rows, *columns), (place, *_) = piece.hf_index, piece.local_index
    start = rows.start + plain
    half = (rows.stop - start) // 2
    spans = [(slice(rows.start, start), slice(place.start, place.start + plain))] if plain else []
    spans += [(slice(start + i * half, start + (i + 1) * half), slice(place.start + plain + i, place.stop, 2))
              for i in (0, 1)]
    return [Piece(piece.hf_name, (hf, *columns), (local, *columns), piece.primary) for hf, local in spans]


def unpaired(pieces: Sequence[Piece]) -> list[Piece]:
    """The two halves that `paired` made of rows as one piece, in the order that they have in `local`: what leads from
    one layout to another, both of which have this order, and not to Hugging Face tensors."""
    made: list[Piece] = []
    first: Piece | None = None
    for piece in pieces:
        if piece.local_index[0].step in (None, 1):
            made.append(piece)
        elif first is None:
            first = piece
        else:
            rows = slice(first.hf_index[0].start, piece.hf_index[0].stop)
            place = slice(first.local_index[0].start, piece.local_index[0].stop)
            made.append(replace(
                piece, hf_index=(rows, *piece.hf_index[1:]), local_index=(place, *piece.local_index[1:])))
            first = None
    return made


def coordinates(parallel: ParallelConfig, rank: int) -> RankCoordinates:
    """Megatron-core's order of ranks, 'tp-cp-ep-dp-pp': the first is the fastest. Context parallelism divides dense
    layers only, expert parallelism experts only."""
    stage = parallel.world_size // parallel.pp
    within = rank % stage
    return RankCoordinates(
        tp=within % parallel.tp,
        cp=within // parallel.tp % parallel.cp,
        dp=within // (parallel.tp * parallel.cp),
        pp=rank // stage,
        etp=within % parallel.etp,
        ep=within // parallel.etp % parallel.ep,
        expert_dp=within // (parallel.etp * parallel.ep))


def padded_vocabulary(vocabulary: int, tp: int) -> int:
    """Rows of the embedding and the output layer over all `tp` ranks, each of which holds equally many."""
    return -(-vocabulary // tp) * tp


def stage_layers(layers: int, parallel: ParallelConfig, pp: int, chunk: int) -> range:
    """Decoder layers of model chunk `chunk`, 0 … vpp - 1, of pipeline rank `pp`.

    The model passes all ranks' first chunks, then all second ones (interleaved schedule: arXiv 2104.04473,
    section 2.2). Where layers are not divisible, the stages just before the last have one more: the last computes the
    logits, and earlier ones keep the activations of more micro-batches.
    """
    stages = parallel.pp * parallel.vpp
    each, longer = divmod(layers, stages)
    stage = chunk * parallel.pp + pp
    first_longer = stages - 1 - longer
    start = stage * each + min(max(stage - first_longer, 0), longer)
    return range(start, start + each + (first_longer <= stage < stages - 1))


def local_experts(experts: int, parallel: ParallelConfig, ep: int) -> range:
    """Experts of expert-parallel rank `ep`."""
    each = experts // parallel.ep
    return range(ep * each, (ep + 1) * each)


def local_shape(pieces: list[Piece]) -> tuple[int, ...]:
    """Shape of the parameter that these pieces tile, padding included."""
    ends = [[span.stop for span in piece.local_index] for piece in pieces]
    rows, *others = (max(stops) for stops in zip(*ends, strict=True))
    return (rows + sum(piece.padding for piece in pieces), *others)

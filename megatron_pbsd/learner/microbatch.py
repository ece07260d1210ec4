"""From a ragged batch to what one rank feeds its model with in one micro-batch. Pure numpy.

Here, and nowhere else, token-aligned fields are shifted for next-token prediction: position s of the inputs is
token s of the sequence and predicts token s + 1, whose loss mask, advantage and log-probs belong to the prediction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_pbsd.batch import SCHEMA, Batch


@dataclass(frozen=True)
class Shape:
    """How positions of a micro-batch are laid out.

    packed:    sequences end to end in one row (THD), or a row for each (padded).
    cp:        context-parallel ranks, each of which holds two of 2 cp chunks of every sequence (zigzag: the r-th, and
               the r-th from the end, so that all have the same causal work).
    multiple:  a rank's positions in a row are a multiple of this (sequence parallelism divides them).
    """

    packed: bool
    cp: int = 1
    multiple: int = 1

    @property
    def granule(self) -> int:
        """Positions of a sequence are padded to a multiple of this."""
        return 2 * self.cp if self.cp > 1 else 1

    @property
    def row_multiple(self) -> int:
        """Positions of a row, over all context-parallel ranks, are padded to a multiple of this."""
        return self.granule * self.multiple


@dataclass(frozen=True)
class MicroBatch:
    """P: positions of this rank, B * S. N: predictions asked for on this rank.

    sequences:  indices of the batch's sequences in this micro-batch, in order; equal on all context-parallel ranks.
    inputs:     [B, S] int64 token ids; B = 1 when packed.
    bounds:     int32, cumulative padded lengths over all context-parallel ranks when packed, else None.
    padding:    [B, S] bool, True where no token stands.
    selected:   [N] int64, the predictions that are asked for, as indices into the flattened [S, B] positions.
    targets:    [N] int64, the tokens predicted there.
    sequence:   [N] int64, the prediction's sequence as an index into `sequences`.
    rows, columns:  [N] int64, where the predicted token stands in the batch: sequence and position.
    fields:     name → [N, …], the batch's fields at the predicted tokens.
    trained:    predictions asked for over all context-parallel ranks.
    cp:         context-parallel ranks that hold a part of this micro-batch.
    experts:    [S, B, layers, K] int16 or None: the experts prescribed for each position, -1 where none are.
    """

    sequences: tuple[int, ...]
    inputs: np.ndarray
    bounds: np.ndarray | None
    padding: np.ndarray
    selected: np.ndarray
    targets: np.ndarray
    sequence: np.ndarray
    rows: np.ndarray
    columns: np.ndarray
    fields: dict[str, np.ndarray]
    trained: int
    cp: int = 1
    experts: np.ndarray | None = None


def positions(length: int) -> int:
    """Positions of a sequence of `length` tokens: the last token is predicted, never read. At least one, so that no
    tensor is empty."""
    return max(length - 1, 1)


def places(lengths: Sequence[int], shape: Shape, cp_rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Which token stands at each of a rank's positions.

    lengths: positions of each sequence of the micro-batch. Returns int64 [B, S] sequence (index into `lengths`, -1 for
    a row or a tail of padding), int64 [B, S] position in the sequence (beyond its end for padding), and the bounds of
    the packed sequences.
    """
    if shape.packed:
        widths = [_up(n, shape.granule) for n in lengths]
        if filler := _up(max(sum(widths), 1), shape.row_multiple) - sum(widths):
            widths.append(filler)
        numbers = [i if i < len(lengths) else -1 for i in range(len(widths))]
        sequence = np.concatenate([np.full(w // shape.cp, i) for i, w in zip(numbers, widths, strict=True)])[None]
        position = np.concatenate([_zigzag(w, shape.cp, cp_rank) for w in widths])[None]
        return sequence, position, np.cumsum([0, *widths], dtype=np.int32)
    width = _up(max(lengths, default=1), shape.row_multiple)
    row = _zigzag(width, shape.cp, cp_rank)
    rows = np.arange(len(lengths)) if lengths else np.array([-1])
    return np.repeat(rows[:, None], len(row), 1), np.repeat(row[None], len(rows), 0), None


def build(batch: Batch, sequences: Sequence[int], fields: Mapping[str, Sequence[np.ndarray]], shape: Shape,
          cp_rank: int = 0, experts: bool = False) -> MicroBatch:
    """Lay these sequences out for a context-parallel rank.

    Predictions are asked for where `loss_mask` is not 0, or everywhere when the batch has none. `fields` are columns
    of token granularity, by sequence of the whole batch. `experts`: prescribe those in the batch.
    """
    tokens = batch["tokens"]
    sequence, position, bounds = places([positions(len(tokens[i])) for i in sequences], shape, cp_rank)
    # Columns of a concatenation of all sequences, each followed by one element that stands for its padding.
    offsets = np.cumsum([0, *(len(tokens[i]) + 1 for i in sequences)])
    lengths = np.array([len(tokens[i]) for i in sequences] or [0])
    real = (sequence >= 0) & (position < lengths[sequence] - 1)
    here = np.where(real, offsets[sequence] + position, 0)

    flat = _joined([np.append(tokens[i], SCHEMA["tokens"].fill) for i in sequences], "int64")
    wanted = _joined([
        np.append(batch["loss_mask"][i] if "loss_mask" in batch else np.ones(len(tokens[i])), 0) for i in sequences])
    predicted = real & (wanted[np.minimum(here + 1, len(wanted) - 1)] != 0)
    # [S, B] order, as the model's hidden states have it.
    selected = np.flatnonzero(predicted.T)
    chosen, columns = sequence.T.flatten()[selected], position.T.flatten()[selected] + 1
    rows = np.array(sequences, np.int64)[chosen] if len(selected) else np.empty(0, np.int64)
    return MicroBatch(
        sequences=tuple(sequences),
        inputs=np.where(real, flat[here], SCHEMA["tokens"].fill),
        bounds=bounds,
        padding=~real,
        selected=selected,
        targets=flat[offsets[chosen] + columns],
        sequence=chosen,
        rows=rows,
        columns=columns,
        fields={name: _picked(values, rows, columns) for name, values in fields.items()},
        # The first token of a sequence is never predicted.
        trained=sum(int(np.count_nonzero(batch["loss_mask"][i][1:])) if "loss_mask" in batch else len(tokens[i]) - 1
                    for i in sequences),
        cp=shape.cp,
        experts=_experts(batch, sequences, sequence, position, real) if experts else None)


def _experts(batch: Batch, sequences: Sequence[int], sequence: np.ndarray, position: np.ndarray,
             real: np.ndarray) -> np.ndarray:
    column = batch["routed_experts"]
    prescribed = np.full((*sequence.shape, *column[0].shape[1:]), -1, np.int16)
    for i, member in enumerate(sequences):
        mine = real & (sequence == i)
        prescribed[mine] = column[member][position[mine]]
    return np.swapaxes(prescribed, 0, 1)


def _picked(values: Sequence[np.ndarray], rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """values[row][column] for each pair."""
    extra, dtype = values[0].shape[1:], values[0].dtype
    picked = np.empty((len(rows), *extra), dtype)
    for row in np.unique(rows):
        mine = rows == row
        picked[mine] = values[row][columns[mine]]
    return picked


def _zigzag(width: int, cp: int, rank: int) -> np.ndarray:
    if cp == 1:
        return np.arange(width)
    chunk = width // (2 * cp)
    return np.concatenate([np.arange(c * chunk, (c + 1) * chunk) for c in (rank, 2 * cp - 1 - rank)])


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _joined(parts: list[np.ndarray], dtype: str = "float32") -> np.ndarray:
    return np.concatenate(parts).astype(dtype) if parts else np.zeros(1, dtype)

"""From a ragged batch to each data-parallel rank's padded micro-batches. Pure numpy.

Here, and nowhere else, token-aligned fields are shifted for next-token prediction: position s of the inputs is
token s of the sequence and predicts token s + 1, whose loss mask, advantage and log-probs belong to the prediction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_pbsd.batch import SCHEMA, Batch
from megatron_pbsd.learner.errors import LearnerError


@dataclass(frozen=True)
class MicroBatch:
    """inputs:     [B, S] int64, right-padded token ids.
    selected:   [N] int64, the predictions that are asked for, as indices into the flattened [S, B] positions.
    targets:    [N] int64, the tokens predicted there.
    fields:     name → [N], the batch's token fields at the predicted tokens.
    sequences, positions:  [N] int64, where the predicted tokens stand in the batch.
    """

    inputs: np.ndarray
    selected: np.ndarray
    targets: np.ndarray
    fields: dict[str, np.ndarray]
    sequences: np.ndarray
    positions: np.ndarray


def deal(lengths: Sequence[int], ranks: int, budget: int, multiple: int = 1) -> list[list[list[int]]]:
    """Sequence indices by rank and micro-batch: `result[rank][micro_batch]`.

    Sequences are dealt in order of length, so that the ranks' micro-batches are equally many and of like shape; some
    may be empty. No micro-batch pads to more than `budget` positions (a sequence of T tokens has T - 1 positions,
    rounded up to `multiple`). LearnerError when a single sequence exceeds the budget.
    """
    if not lengths:
        raise LearnerError("a batch without sequences cannot be divided into micro-batches")
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    rows = [order[i : i + ranks] for i in range(0, len(order), ranks)]
    result: list[list[list[int]]] = [[] for _ in range(ranks)]
    start = 0
    while start < len(rows):
        width = padded_width(lengths[rows[start][0]], multiple)
        if width > budget:
            raise LearnerError(
                f"learner.micro_batch_tokens = {budget} is less than the {width} positions of the longest sequence; "
                f"set it to at least {width}")
        stop = start + budget // width
        for rank in range(ranks):
            result[rank].append([row[rank] for row in rows[start:stop] if rank < len(row)])
        start = stop
    return result


def padded_width(length: int, multiple: int) -> int:
    """Positions of a sequence of `length` tokens; at least one, so that no tensor is empty."""
    return -(-max(length - 1, 1) // multiple) * multiple


def build(batch: Batch, sequences: Sequence[int], fields: Sequence[str], multiple: int = 1) -> MicroBatch:
    """Pad these sequences. Predictions are asked for where `loss_mask` is not 0, or everywhere when there is none."""
    tokens = batch["tokens"]
    width = padded_width(max((len(tokens[i]) for i in sequences), default=0), multiple)
    inputs = np.full((max(len(sequences), 1), width), SCHEMA["tokens"].fill, np.int64)
    places: list[tuple[np.ndarray, int, int]] = []
    for row, i in enumerate(sequences):
        inputs[row, : len(tokens[i]) - 1] = tokens[i][:-1]
        wanted = batch["loss_mask"][i][1:] if "loss_mask" in batch else np.ones(len(tokens[i]) - 1)
        places.append((np.flatnonzero(wanted), row, i))
    here = _joined([s for s, _, _ in places])
    row = _joined([np.full(len(s), row) for s, row, _ in places])
    return MicroBatch(
        inputs=inputs,
        selected=here * len(inputs) + row,
        targets=_joined([tokens[i][s + 1] for s, _, i in places]),
        fields={name: _joined([batch[name][i][s + 1] for s, _, i in places], SCHEMA[name].dtype) for name in fields},
        sequences=_joined([np.full(len(s), i) for s, _, i in places]),
        positions=here + 1)


def _joined(parts: list[np.ndarray], dtype: str = "int64") -> np.ndarray:
    return np.concatenate(parts).astype(dtype) if parts else np.empty(0, dtype)


def micro_batches(
    batch: Batch, rank: int, ranks: int, budget: int, fields: Sequence[str], multiple: int = 1
) -> list[MicroBatch]:
    """The micro-batches of data-parallel rank `rank` of `ranks`; every rank has equally many."""
    return [build(batch, part, fields, multiple) for part in deal(batch.lengths, ranks, budget, multiple)[rank]]

"""Over what token losses are averaged. Weights are made from the whole batch, before it is divided over ranks and
micro-batches, so that a reduction cannot depend on the layout. Pure numpy."""

from __future__ import annotations

import numpy as np

from megatron_pbsd.batch import Batch
from megatron_pbsd.losses.errors import LossError
from megatron_pbsd.losses.inputs import Constant, Reduction

FIELDS: dict[Reduction, str] = {"turn": "turn_index", "group": "group"}
"""What a reduction reads besides loss_mask."""


def token_weights(batch: Batch, reduction: Reduction) -> list[np.ndarray]:
    """float32 [T_i] per sequence, 0 where `loss_mask` is and at position 0, which nothing predicts.

    The batch's loss is `sum(weight * token loss) / N` with N the number of trained tokens, by which Megatron divides
    the gradient:

        token        mean over tokens: weight 1 (DAPO, arXiv 2503.14476, eq. 8, over the whole batch)
        turn         mean over turns of the mean over each turn's tokens
        trajectory   mean over sequences of the mean over their tokens (GRPO, arXiv 2402.03300, eq. 3)
        group        mean over prompt groups of the mean over all tokens of the group (DAPO, eq. 8, group by group)
        Constant(c)  sum over tokens / (sequences * c) (Dr.GRPO, arXiv 2503.20783)

    Turns, sequences and groups without a trained token have no mean and are not counted; `Constant` counts all
    sequences. LossError when the batch lacks the field that says which turn or group a token is of.
    """
    trained = [(mask > 0) & (np.arange(len(mask)) > 0) for mask in batch["loss_mask"]]
    lengths = [int(mask.sum()) for mask in trained]
    total = sum(lengths)
    weights = [np.zeros(len(mask), np.float32) for mask in trained]
    if total == 0:
        return weights
    if reduction == "token":
        flat = np.ones(total)
    elif isinstance(reduction, Constant):
        flat = np.full(total, total / (batch.size * reduction.tokens))
    else:
        cells = _cells(batch, reduction, trained)
        _, member, counts = np.unique(cells, axis=0, return_inverse=True, return_counts=True)
        flat = total / (len(counts) * counts[member.ravel()])
    for row, mask, values in zip(weights, trained, np.split(flat, np.cumsum(lengths)[:-1]), strict=True):
        row[mask] = values
    return weights


def _cells(batch: Batch, reduction: Reduction, trained: list[np.ndarray]) -> np.ndarray:
    """int64 [N, 2]: trained tokens of equal rows are averaged together."""
    field = FIELDS.get(reduction)
    if field is not None and field not in batch:
        raise LossError(f"reduction {reduction!r} needs the batch field {field!r}, which the batch lacks")
    cells = []
    for i, mask in enumerate(trained):
        sequence = np.full(int(mask.sum()), i if reduction != "group" else batch["group"][i])
        cells.append(np.stack([sequence, batch["turn_index"][i][mask] if reduction == "turn" else 0 * sequence], -1))
    return np.concatenate(cells)

"""Batch columns as a loss reads them: per token, whatever their granularity."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_pbsd.batch import SCHEMA, Batch


def per_token(batch: Batch, names: Sequence[str]) -> dict[str, list[np.ndarray]]:
    """[T_i, …] per sequence and name; what is known of a turn or a trajectory is repeated for each of its tokens.

    A token outside all turns gets the fill value of a turn field.
    """
    return {name: _COLUMNS[SCHEMA[name].granularity](batch, name) for name in names}


def _of_turns(batch: Batch, name: str) -> list[np.ndarray]:
    fill = np.array([SCHEMA[name].fill], SCHEMA[name].dtype)
    # Turn -1, no turn, is the last element.
    return [np.append(values, fill)[turns] for values, turns in zip(batch[name], batch["turn_index"], strict=True)]


_COLUMNS = {
    "token": lambda batch, name: batch[name],
    "turn": _of_turns,
    "trajectory": lambda batch, name: [
        np.full(length, value) for value, length in zip(batch[name], batch.lengths, strict=True)],
}

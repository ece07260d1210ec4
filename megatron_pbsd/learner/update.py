"""What one optimizer step did. Pure: the driver reads it without importing Megatron."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Update:
    """What one optimizer step did.

    metrics:    of the global batch, the same on every rank.
    log_probs:  float32 [T_i] per sequence under the policy before the update, 0 where nothing is trained: what
                `log_probs` would have returned, at no cost. Rank 0 has them, other ranks None.
    """

    metrics: dict[str, float]
    log_probs: list[np.ndarray] | None

"""Over what token losses are averaged. Weights are made from the whole batch, before it is divided over ranks and
micro-batches, so that a reduction cannot depend on the layout. Pure numpy."""

from __future__ import annotations

import numpy as np

from megatron_pbsd.batch import Batch
from megatron_pbsd.losses.inputs import Reduction


def token_weights(batch: Batch, reduction: Reduction) -> list[np.ndarray]:
    """float32 [T_i] per sequence, 0 where `loss_mask` is: the batch's loss is `sum(weight * token loss) / N` with N the
    number of trained tokens, by which Megatron divides the gradient.

    token:       mean over all tokens: weight 1.
    """
    if reduction != "token":
        raise NotImplementedError(reduction)
    return [(mask > 0).astype(np.float32) for mask in batch["loss_mask"]]

"""What is computed per token on many ranks, brought together on rank 0."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_pbsd.batch import Batch
from megatron_pbsd.learner.microbatch import MicroBatch


class TokenTable:
    """`columns` numbers per token of a batch, put in by the ranks that compute them and collected on rank 0."""

    def __init__(self, batch: Batch, columns: int, device: torch.device):
        self._offsets = np.cumsum([0, *batch.lengths])
        self._flat = torch.zeros(int(self._offsets[-1]), columns, device=device)

    def put(self, micro: MicroBatch, values: torch.Tensor) -> None:
        """`values` [columns, N] of the tokens a micro-batch predicts.

        Tensor-parallel ranks have the same; one of them counts.
        """
        if parallel_state.get_tensor_model_parallel_rank() == 0:
            index = torch.from_numpy(self._offsets[micro.rows] + micro.columns)
            self._flat[index.to(self._flat.device)] = values.T

    def collect(self) -> list[list[np.ndarray]] | None:
        """float32 [T_i] by column and sequence on rank 0, None elsewhere; every rank calls this."""
        dist.reduce(self._flat, dst=0)
        if dist.get_rank() != 0:
            return None
        return [np.split(column, self._offsets[1:-1]) for column in self._flat.T.contiguous().cpu().numpy()]

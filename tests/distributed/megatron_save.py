"""Megatron-core's own save strategy, in the calling process.

Without that it starts a manager and writer processes for every save: seconds of imports, and a second run of the
caller's __main__.
"""

from __future__ import annotations

import torch.distributed.checkpoint as torch_checkpoint
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)


class InProcessSave(TorchDistSaveShardedStrategy):
    def __init__(self):
        super().__init__("torch_dist", 1)

    def save(self, sharded_state_dict, checkpoint_dir):
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, self.keep_only_main_replica)
        torch_checkpoint.save(
            mcore_to_pyt_state_dict(by_key),
            storage_writer=torch_checkpoint.FileSystemWriter(checkpoint_dir, sync_files=False),
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False))

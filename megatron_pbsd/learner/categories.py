"""Names of what a learner rank has on its device."""

CATEGORIES = ("parameters", "gradients", "master_weights", "optimizer_state", "communicators")
"""master_weights: the optimizer's float32 copies of bfloat16 parameters. communicators: NCCL's buffers."""

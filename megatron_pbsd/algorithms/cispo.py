"""CISPO: GRPO's advantages; what differs is the loss, which clips importance weights and no token's gradient."""

from __future__ import annotations

from megatron_pbsd.algorithms.grpo import GRPO


class CISPO(GRPO):
    """`A = (r - mean of its group) / std of its group` (arXiv 2506.13585, section 3.1)."""

"""GSPO: GRPO's advantages; what differs is the loss, whose importance ratio is that of the whole trajectory."""

from __future__ import annotations

from megatron_pbsd.algorithms.grpo import GRPO


class GSPO(GRPO):
    """`A = (r - mean of its group) / std of its group` (arXiv 2507.18071, eq. 6)."""

"""What of a tensor goes over the wire: its numbers as they are, converted, or in 8 bits with a scale for each block."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from megatron_pbsd.boxes import Box, size
from megatron_pbsd.models.decoder import kept_in_float32
from megatron_pbsd.models.sglang import quantised
from megatron_pbsd.resharding.layouts import Layout

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}
"""Of a number, by torch's name of its dtype."""
FLOAT8 = "float8_e4m3fn"
SCALE_BYTES = 4
BLOCK = (128, 128)
"""Rows and columns that share a scale (DeepSeek-V3, arXiv 2412.19437, section 3.3)."""


class Transform(StrEnum):
    COPY = "copy"
    CAST_AT_SOURCE = "cast at the source"
    CAST_AT_TARGET = "cast at the target"
    QUANTISE_AT_SOURCE = "quantise at the source"
    QUANTISE_AT_TARGET = "quantise at the target"


@dataclass(frozen=True)
class Wire:
    """How a tensor is sent: as `dtype`. The source applies a transform that it can, if it makes fewer bytes.

    block: rows and columns for each of which a float32 scale goes with the numbers; None where none does. It is
    written where the target keeps scales, at a block's place.
    """

    transform: Transform
    dtype: str
    block: tuple[int, int] | None = None

    def nbytes(self, box: Box) -> int:
        """Of tensor[box], which consists of whole blocks, but for the last ones of the tensor."""
        scales = 0
        if self.block is not None:
            rows, columns = (-(-s.stop // b) - s.start // b for s, b in zip(box, self.block, strict=True))
            scales = rows * columns * SCALE_BYTES
        return size(box) * BYTES[self.dtype] + scales


def stored_dtype(name: str, shape: tuple[int, ...], dtype: str) -> str:
    """What a tensor is stored as in a model of `dtype`: biases of expert choice in float32, and of a model in 8 bits
    the projections of layers only, the rest in bfloat16."""
    if kept_in_float32(name):
        return "float32"
    return "bfloat16" if dtype == FLOAT8 and not quantised(name, shape) else dtype


def wire(held: str, wanted: str, whole_blocks: bool) -> Wire:
    """held, wanted: dtypes at source and target.

    whole_blocks: whatever a source sends to a target is whole blocks, so that it knows every number that a scale is of.
    Otherwise numbers are sent as they are held, and the target makes the scales.
    """
    if held == wanted:
        return Wire(Transform.COPY, held)
    if wanted == FLOAT8:
        if whole_blocks:
            return Wire(Transform.QUANTISE_AT_SOURCE, FLOAT8, BLOCK)
        return Wire(Transform.QUANTISE_AT_TARGET, held)
    if BYTES[wanted] < BYTES[held]:
        return Wire(Transform.CAST_AT_SOURCE, wanted)
    return Wire(Transform.CAST_AT_TARGET, held)


def whole_blocks(box: Box, shape: tuple[int, ...], block: tuple[int, int] = BLOCK) -> bool:
    """Whether tensor[box] consists of whole blocks, but for the last ones of the tensor."""
    return all(s.start % b == 0 and (s.stop % b == 0 or s.stop == n)
               for s, n, b in zip(box, shape, block, strict=True))


def cut_blocks(target: Layout) -> list[str]:
    """One sentence for each kind of matrix in 8 bits of which a rank's part begins or ends within a block, where there
    is no scale for it: SGLang refuses such layouts."""
    cut = {}
    for slot in target.slots:
        kind = slot.kind
        if not quantised(kind.name, kind.shape):
            continue
        begins = all(s.start % b == 0 for s, b in zip(slot.local[-2:], BLOCK, strict=True))
        if not (begins and whole_blocks(slot.box, kind.shape)):
            cut[kind.name] = tuple(s.stop - s.start for s in slot.box)
    return [f"{name}: a rank's part has shape {shape}, which is not whole blocks of {BLOCK}; a smaller tp, or for "
            "experts a larger ep, makes it larger" for name, shape in cut.items()]

"""Boxes of tensors: what parts of them have in common."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

Box = tuple[slice, ...]


def intersection(a: Box, b: Box) -> Box | None:
    """What two boxes of a tensor have in common; None when that is nothing."""
    common = tuple(slice(max(x.start, y.start), min(x.stop, y.stop)) for x, y in zip(a, b, strict=True))
    return common if all(s.start < s.stop for s in common) else None


def relative(box: Box, origin: Sequence[int]) -> Box:
    """The same elements in a tensor that begins at `origin`."""
    return tuple(slice(s.start - o, s.stop - o) for s, o in zip(box, origin, strict=True))


def size(box: Box) -> int:
    """Elements in it; its slices have a step of 1."""
    return prod(s.stop - s.start for s in box)

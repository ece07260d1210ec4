"""Hugging Face folders whose matrices are stored in 8 bits with a scale for each block, as DeepSeek-V3, R1 and Kimi-K2
are published (arXiv 2412.19437, section 3.3): read as the numbers that they stand for.

    NAME              float8_e4m3fn [rows, columns]
    NAME_scale_inv    float32 [⌈rows / block⌉, ⌈columns / block⌉]: what the elements of a block are multiplied with
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_pbsd.checkpointing.hf_folder import HfFolder, HfTensor
from megatron_pbsd.models.errors import ModelError
from megatron_pbsd.models.hf_config import FieldRule, checked, ignored, mapped, only, read
from megatron_pbsd.models.parameters import Index

QUANTIZATION, SCALE = "quantization_config", "_scale_inv"
FIELDS: Mapping[str, FieldRule] = {
    "quant_method": only("fp8"),
    "fmt": only("e4m3"),
    "weight_block_size": mapped(list),
    # How activations and scales are rounded; and modules that are not in 8 bits, which their tensors say themselves.
    **{name: ignored() for name in ("activation_scheme", "scale_fmt", "modules_to_not_convert", "dequantize")},
}


class BlockScaledFolder(HfFolder):
    """`tensors` are the matrices as `dtype`, and what is not in 8 bits as it is. ModelError naming every matrix without
    scales, and scales without their matrix or of another shape or dtype.

    block: rows and columns that share a scale.
    """

    def __init__(self, folder: str | Path, block: tuple[int, int], dtype: torch.dtype):
        super().__init__(folder)
        self._block, self._stored = block, self.tensors
        problems = [problem for name in self._stored if (problem := self._problem(name))]
        if problems:
            raise ModelError(f"weights in {self.folder}: " + "; ".join(problems))
        self.tensors = {name: replace(tensor, dtype=dtype) if _in_8_bits(tensor) else tensor
                        for name, tensor in self._stored.items() if not name.endswith(SCALE)}

    def read(self, name: str, index: Index) -> torch.Tensor:
        """That part of the tensor, not to be written to."""
        stored = self._stored[name]
        if not _in_8_bits(stored):
            return super().read(name, index)
        (rows, columns), (high, wide) = index, self._block
        every = slice(0, stored.shape[1])
        made = torch.empty(rows.stop - rows.start, columns.stop - columns.start, dtype=self.tensors[name].dtype)
        which = torch.arange(columns.start, columns.stop) // wide
        # A row of blocks at a time, as single precision takes four times what is stored.
        for row in range(rows.start // high, -(-rows.stop // high)):
            held = slice(max(row * high, rows.start), min((row + 1) * high, rows.stop))
            scales = self._part(self._stored[name + SCALE], (slice(row, row + 1), slice(0, -(-every.stop // wide))))
            values = self._part(stored, (held, columns)).float()
            made[held.start - rows.start : held.stop - rows.start] = values.mul_(scales[:, which])
        return made

    def checksums(self) -> dict[str, str]:
        """Of tensors that are not in 8 bits."""
        return {name: value for name, value in super().checksums().items() if not _in_8_bits(self._stored[name])}

    def _problem(self, name: str) -> str | None:
        tensor = self._stored[name]
        if name.endswith(SCALE):
            matrix = self._stored.get(name.removesuffix(SCALE))
            return None if matrix is not None and _in_8_bits(matrix) else f"{name} has no matrix in 8 bits"
        if not _in_8_bits(tensor):
            return None
        if len(tensor.shape) != 2:
            return f"{name} is float8_e4m3fn with shape {tensor.shape}; supported: matrices"
        scales = self._stored.get(name + SCALE)
        if scales is None:
            return f"{name} is float8_e4m3fn, but {name}{SCALE} is missing"
        shape = tuple(-(-n // b) for n, b in zip(tensor.shape, self._block, strict=True))
        if (scales.dtype, scales.shape) != (torch.float32, shape):
            return (f"{name}{SCALE} is {str(scales.dtype).removeprefix('torch.')} {scales.shape}, blocks of "
                    f"{self._block} of {tensor.shape} need float32 {shape}")
        return None


def read_plain(folder: str | Path) -> dict[str, Any]:
    """config.json of the model as `weights` hands it out. ModelError when it is quantised in another way."""
    hf = read(folder)
    _block(hf)
    return {name: value for name, value in hf.items() if name != QUANTIZATION or value is None}


def weights(folder: str | Path, dtype: str | None = None) -> HfFolder:
    """A folder's tensors. dtype: torch's name of what matrices in 8 bits are read as; None: what config.json says."""
    folder = Path(folder)
    hf = read(folder) if (folder / "config.json").is_file() else {}
    block = _block(hf)
    if block is None:
        return HfFolder(folder)
    dtype = dtype or hf.get("dtype", hf.get("torch_dtype"))
    if dtype not in ("bfloat16", "float16", "float32"):
        raise ModelError(f"config.json: 'dtype' = {dtype!r} is no dtype that matrices in 8 bits can be read as; "
                         "supported: 'bfloat16', 'float16', 'float32'")
    return BlockScaledFolder(folder, block, getattr(torch, dtype))


def _block(hf: Mapping[str, Any]) -> tuple[int, int] | None:
    described = hf.get(QUANTIZATION)
    if described is None:
        return None
    if not isinstance(described, dict):
        raise ModelError(f"config.json: '{QUANTIZATION}' = {described!r} is not an object")
    checked(described, FIELDS, ("quant_method", "weight_block_size"), f"{QUANTIZATION}.")
    block = described["weight_block_size"]
    if len(block) != 2 or not all(type(n) is int and n > 0 for n in block):
        raise ModelError(f"config.json: '{QUANTIZATION}.weight_block_size' = {block} is not rows and columns")
    return block[0], block[1]


def _in_8_bits(tensor: HfTensor) -> bool:
    return tensor.dtype == torch.float8_e4m3fn

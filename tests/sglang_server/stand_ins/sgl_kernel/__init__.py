"""Stand-in for SGLang's compiled kernels, of which PyPI has CUDA builds only.

Without AMX SGLang computes in plain torch: the one operator that is needed from here hashes seeds. Every other name
exists, and fails when it is called.
"""

import numpy as np
import torch

__version__ = "0.4.10"


def murmur_hash32(seeds, positions, columns):
    """uint32 [rows, columns]: MurmurHash3 (x86, 32 bits, seed 0) of each row's 64-bit seed and 32-bit position, and the
    column's 32-bit number, 16 bytes."""
    seed = seeds.numpy().astype(np.uint64)[:, None]
    low = np.uint64(0xFFFFFFFF)
    blocks = (seed & low, seed >> np.uint64(32), positions.numpy()[:, None], columns.numpy()[None])
    h = np.zeros((len(seeds), len(columns)), np.uint32)
    for block in blocks:
        k = rotated(block.astype(np.uint32) * np.uint32(0xCC9E2D51), 15) * np.uint32(0x1B873593)
        h = rotated(h ^ k, 13) * np.uint32(5) + np.uint32(0xE6546B64)
    h = h ^ np.uint32(16)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        h = (h ^ h >> np.uint32(shift)) * np.uint32(factor)
    return torch.from_numpy(h)


def rotated(x, bits):
    return x << np.uint32(bits) | x >> np.uint32(32 - bits)


library = torch.library.Library("sgl_kernel", "FRAGMENT")
library.define("murmur_hash32_cpu(Tensor seeds, Tensor positions, Tensor columns) -> Tensor")
library.impl("murmur_hash32_cpu", murmur_hash32, "CPU")


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def absent(*arguments, **options):
        raise NotImplementedError(f"sgl_kernel.{name} has no stand-in on a CPU")

    return absent

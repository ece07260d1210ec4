"""Stand-in for SGLang's compiled kernels, of which PyPI has CUDA builds only.

Without AMX SGLang computes in plain torch: what is needed from here hashes seeds, and keeps account of places in the KV
pool when drafts are verified. Every other name exists, and fails when it is called.
"""

import ctypes

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


def assign_req_to_token_pool_cpu(rows, table, starts, ends, values, width):
    """Write `values`, one request's after the other's, to [start, end) of the requests' rows of `table`."""
    for row, start, end in zip(rows.tolist(), starts.tolist(), ends.tolist()):
        table[row, start:end] = values[: end - start]
        values = values[end - start :]


def assign_extend_cache_locs_cpu(rows, table, starts, ends, values, width):
    """The reverse: read them from there."""
    read = [table[row, start:end] for row, start, end in zip(rows.tolist(), starts.tolist(), ends.tolist())]
    read = torch.cat(read)
    values[: len(read)] = read


def fill_accept_out_cache_loc_cpu(kept, places, kept_places):
    """Those places that are kept (not -1), close together."""
    kept = kept.ravel()[kept.ravel() >= 0].long()
    kept_places[: len(kept)] = places[kept]


def copy_all_layer_kv_cache_cpu(buffers, strides, targets, sources):
    """Rows of `stride` bytes of the buffers at these addresses; all are read before any is written."""
    for buffer, stride in zip(buffers.tolist(), strides.tolist()):
        rows = [ctypes.string_at(buffer + source * stride, stride) for source in sources.tolist()]
        for target, row in zip(targets.tolist(), rows):
            ctypes.memmove(buffer + target * stride, row, stride)


def verify_tree_greedy_cpu(
    predicts, accept_index, accept_token_num, candidates, retrive_index, retrive_next_token, retrive_next_sibling,
    target_predict,
):
    """Of each request: from the root (node 0) on to the child that is what was predicted after its parent, while there
    is one."""
    for request, predicted in enumerate(target_predict.tolist()):
        tokens, node, path = candidates[request].tolist(), 0, [0]
        while (node := int(retrive_next_token[request, node])) >= 0 and len(path) < accept_index.shape[1]:
            while node >= 0 and tokens[node] != predicted[path[-1]]:
                node = int(retrive_next_sibling[request, node])
            if node < 0:
                break
            path.append(node)
        numbers = retrive_index[request, path]
        accept_index[request, : len(path)] = numbers.to(accept_index.dtype)
        accept_token_num[request] = len(path) - 1
        predicts[numbers] = target_predict[request, path].to(predicts.dtype)


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def absent(*arguments, **options):
        raise NotImplementedError(f"sgl_kernel.{name} has no stand-in on a CPU")

    return absent

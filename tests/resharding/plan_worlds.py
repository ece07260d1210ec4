"""Models of which every element is a number of its own, held by the ranks of a learner; plans carried out on them."""

from __future__ import annotations

import numpy as np

from megatron_pbsd.models.decoder import hf_tensors
from megatron_pbsd.models.mapping import pieces
from megatron_pbsd.models.parameters import coordinates, local_shape
from tests.resharding.sglang_reference import rank_parameters


def numbered(decoder) -> dict[str, np.ndarray]:
    """Checkpoint name → int64 array; every element of the model has another number, from 1 on."""
    made, start = {}, 1
    for name, shape in hf_tensors(decoder).items():
        made[name] = np.arange(start, start + int(np.prod(shape))).reshape(shape)
        start += made[name].size
    return made


def learner_parameters(decoder, parallel, tensors) -> list[dict[tuple[int, str], np.ndarray]]:
    """For each rank: (chunk, Megatron's name) → array, padding 0."""
    ranks = []
    for rank in range(parallel.world_size):
        held = {}
        for chunk in range(parallel.vpp):
            for name, parts in pieces(decoder, parallel, coordinates(parallel, rank), chunk).items():
                array = np.zeros(local_shape(parts), np.int64)
                for piece in parts:
                    array[piece.local_index] = tensors[piece.hf_name][piece.hf_index]
                held[chunk, name] = array
        ranks.append(held)
    return ranks


def server_parameters(decoder, server, servers, tensors) -> list[dict[str, np.ndarray]]:
    """For each rank of all servers: SGLang's name → array, padding 0."""
    return [rank_parameters(decoder, server, tensors, rank % server.tp, rank // server.tp % server.pp)
            for rank in range(servers * server.size)]


def carried_out(plan, sources, wanted) -> tuple[list[dict[str, np.ndarray]], list[dict[str, np.ndarray]]]:
    """What targets hold after all transfers, and how often each element was written; `wanted` says names and shapes."""
    held = [{name: np.zeros_like(array) for name, array in rank.items()} for rank in wanted]
    written = [{name: np.zeros_like(array) for name, array in rank.items()} for rank in wanted]
    for transfer in plan.transfers():
        place, origin = transfer.target_place, transfer.source_place
        value = sources[transfer.source][origin.chunk, origin.name][origin.box]
        target = held[transfer.target][place.name]
        target[place.box] = value.reshape(target[place.box].shape)
        written[transfer.target][place.name][place.box] += 1
    return held, written


def lacking(sources, source_devices, wanted, target_devices) -> list[int]:
    """For each target rank how many numbers it wants that no source rank on its device has, counted one by one."""
    counts = []
    for parameters, device in zip(wanted, target_devices, strict=True):
        there = [array.ravel() for rank, at in zip(sources, source_devices, strict=True) if at == device
                 for array in rank.values()]
        need = np.concatenate([array.ravel() for array in parameters.values()])
        counts.append(int((~np.isin(need[need > 0], np.concatenate(there) if there else [])).sum()))
    return counts

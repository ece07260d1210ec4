"""The fewest bytes that must leave their GPU, from the parameter maps of every rank and without a plan."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from megatron_pbsd.boxes import Box, intersection
from megatron_pbsd.config import ParallelConfig
from megatron_pbsd.models import mapping, sglang
from megatron_pbsd.models.decoder import Decoder
from megatron_pbsd.models.parameters import ParameterMap, coordinates
from megatron_pbsd.models.sglang import ServerParallel


def minimum(
    source: Iterable[tuple[int, ParameterMap]], target: Iterable[tuple[int, ParameterMap]],
    nbytes: Callable[[str, Box], int],
) -> int:
    """Bytes of each target rank's parameters, less those that a source rank on its GPU has.

    source, target: the GPU of each rank, and its parameters. nbytes: of a box of a tensor, on the wire; boxes of one
    layout are equal or have nothing in common.
    """
    there: dict[tuple[int, str], dict[tuple[tuple[int, int], ...], Box]] = {}
    for device, parameters in source:
        for piece in (piece for parts in parameters.values() for piece in parts):
            key = tuple((s.start, s.stop) for s in piece.hf_index)
            there.setdefault((device, piece.hf_name), {})[key] = piece.hf_index
    total = 0
    for device, parameters in target:
        for piece in (piece for parts in parameters.values() for piece in parts):
            total += nbytes(piece.hf_name, piece.hf_index)
            for box in there.get((device, piece.hf_name), {}).values():
                if common := intersection(box, piece.hf_index):
                    total -= nbytes(piece.hf_name, common)
    return total


def learner_maps(decoder: Decoder, parallel: ParallelConfig, device: int = 0) -> list[tuple[int, ParameterMap]]:
    """For `minimum`, of ranks with GPUs from `device` on; one entry for each model chunk of a rank."""
    return [(device + rank, mapping.pieces(decoder, parallel, coordinates(parallel, rank), chunk))
            for rank in range(parallel.world_size) for chunk in range(parallel.vpp)]


def server_maps(
    decoder: Decoder, server: ServerParallel, servers: int, device: int = 0
) -> list[tuple[int, ParameterMap]]:
    """For `minimum`, of all ranks of equal servers with GPUs from `device` on."""
    maps = [sglang.pieces(decoder, server, rank % server.tp, rank // server.tp) for rank in range(server.size)]
    return [(device + rank, maps[rank % server.size]) for rank in range(servers * server.size)]

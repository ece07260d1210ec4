"""What each rank of an SGLang server takes of whole tensors: the plan from whoever has them to the server's layout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from megatron_pbsd.boxes import Box
from megatron_pbsd.models.decoder import Decoder
from megatron_pbsd.models.errors import ModelError
from megatron_pbsd.models.sglang import ServerParallel
from megatron_pbsd.resharding.block_scale import SCALE, blocks_of
from megatron_pbsd.resharding.layouts import embedded_layout, server_layout
from megatron_pbsd.resharding.manifest import WeightsManifest
from megatron_pbsd.resharding.plan import make_plan
from megatron_pbsd.resharding.wire import FLOAT8, cut_blocks

UNCUT = 1 << 60
"""Bytes that nothing is larger than."""


@dataclass(frozen=True)
class Share:
    """parameter[place] = tensor[box]; `place` may begin with an axis for experts that `box` has not."""

    tensor: str
    box: Box
    parameter: str
    place: Box


Shares = Sequence[Mapping[str, Sequence[Share]]]
"""By rank of the server, by tensor."""


def shares_of(decoder: Decoder, server: ServerParallel, dtype: str = "float32") -> Shares:
    """dtype: of the server's model; in 8 bits its scales are shared out too. ModelError when a server cannot divide the
    model like this."""
    source, target = embedded_layout(decoder, 1, device=server.size), server_layout(decoder, server, 1)
    if dtype == FLOAT8 and (cut := cut_blocks(target)):
        raise ModelError("; ".join(cut))
    plan = make_plan(source, target, source_dtype=dtype, target_dtype=dtype, devices_per_node=server.size + 1,
                     bucket_bytes=UNCUT)
    ranks: list[dict[str, list[Share]]] = [{} for _ in range(server.size)]
    for transfer in plan.transfers():
        place = transfer.target_place
        ranks[transfer.target].setdefault(transfer.tensor, []).append(
            Share(transfer.tensor, transfer.box, place.name, place.box))
        if transfer.wire.dtype == FLOAT8:
            name, (*expert, rows, columns) = transfer.tensor + SCALE, place.box
            ranks[transfer.target].setdefault(name, []).append(Share(
                name, blocks_of(transfer.box), place.name + SCALE, (*expert, *blocks_of((rows, columns)))))
    return ranks


def parts(
    share: Mapping[str, Sequence[Share]], manifest: WeightsManifest, tensors: Mapping[str, torch.Tensor]
) -> Iterator[torch.Tensor]:
    """What a rank takes of a bucket, in the order in which it is sent: the bucket's, which has wide numbers first."""
    for entry in manifest.entries:
        for each in share.get(entry.name, ()):
            yield tensors[entry.name][each.box]

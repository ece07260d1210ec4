"""Learner and engines of a transport, each in a thread of its own; the learner is one rank with real parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from megatron_pbsd.config import ParallelConfig
from megatron_pbsd.learner.sending import Sending
from megatron_pbsd.models.decoder import Decoder
from megatron_pbsd.models.mapping import pieces
from megatron_pbsd.models.parameters import coordinates, local_shape
from megatron_pbsd.resharding.block_scale import same
from megatron_pbsd.resharding.checksum import checksum
from megatron_pbsd.resharding.manifest import WeightsManifest
from megatron_pbsd.resharding.shared_memory import attach

ONE = ParallelConfig(world_size=1, tp=1, pp=1)


class LocalMembers:
    """See `resharding.transport.Members`."""

    def __init__(self, **components: Any):
        self.names = list(components)
        self.components = components
        self._threads = {name: ThreadPoolExecutor(1) for name in components}

    def start(self, method: str, *args: Any, only: Sequence[str] | None = None) -> list:
        return [self._threads[name].submit(getattr(component, method), *args)
                for name, component in self.components.items() if only is None or name in only]

    def wait(self, phase: str, pending: Sequence) -> list:
        return [future.result() for future in pending]

    def call(self, method: str, *args: Any) -> list:
        return self.wait(method, self.start(method, *args))

    def checksums(self) -> list[dict[str, str]]:
        return self.call("checksums")

    def score(self, sequences):
        return self.call("score", sequences)

    def write_weights(self, manifest, engine):
        self.wait("write_weights", self.start("write_weights", manifest, only=[self.names[engine]]))

    def close(self) -> None:
        for thread in self._threads.values():
            thread.shutdown()


class OneRank(Sending):
    """Megatron's parameters of the model with these tensors, in float32, without a Megatron model around them."""

    def __init__(self, decoder: Decoder, tensors: Mapping[str, torch.Tensor]):
        self._map = pieces(decoder, ONE, coordinates(ONE, 0), 0)
        parameters = {(0, name): torch.zeros(local_shape(parts)) for name, parts in self._map.items()}
        self._described = {name: ("float32", tuple(tensor.shape)) for name, tensor in tensors.items()}
        self._held = parameters
        super().__init__(0, parameters, self._described, torch.device("cpu"))
        self.take(tensors)

    def take(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """New weights."""
        for name, parts in self._map.items():
            for piece in parts:
                self._held[0, name][piece.local_index] = tensors[piece.hf_name][piece.hf_index]

    def tensors(self):
        return self._described

    def differing(self, manifest: WeightsManifest) -> list[str]:
        published = attach(manifest)
        return sorted({piece.hf_name for name, parts in self._map.items() for piece in parts
                       if piece.hf_name in published and not same(
                           self._held[0, name][piece.local_index], piece.hf_name, piece.hf_index, published)})

    def digests(self) -> dict[tuple[str, str], str]:
        return {(piece.hf_name, str(piece.hf_index)): checksum(self._held[0, name][piece.local_index])
                for name, parts in self._map.items() for piece in parts}

"""Hugging Face weights in and out of a rank's parameters, by the map in `models`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache

import torch

from megatron_pbsd.checkpointing.hf_folder import Source
from megatron_pbsd.learner.errors import LearnerError
from megatron_pbsd.models.decoder import initial_value
from megatron_pbsd.models.errors import ModelError
from megatron_pbsd.models.parameters import ParameterMap, Piece, local_shape
from megatron_pbsd.resharding.block_scale import same
from megatron_pbsd.resharding.checksum import checksum
from megatron_pbsd.resharding.manifest import WeightsManifest
from megatron_pbsd.resharding.shared_memory import attach

VALUE_HEAD = "value_head."


def random(shapes: Mapping[str, tuple[int, ...]], std: float, seed: int) -> Source:
    """Norm weights 1, biases 0, matrices normal(0, std); a tensor depends on its name and the seed, never on the
    layout."""

    @lru_cache(maxsize=3)
    def whole(name: str) -> torch.Tensor:
        if (value := initial_value(name)) is not None:
            return torch.full(shapes[name], value)
        digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        return torch.empty(shapes[name]).normal_(0, std, generator=generator)

    return lambda name, index: whole(name)[index]


class Weights:
    """A rank's parameters under the names and in the parts that Hugging Face has for them.

    chunks:  the rank's model chunks. maps: for each of them what `models` says of its parameters, by name in the chunk.

    ModelError when a map and a chunk do not name the same parameters and shapes. A value head has no name there.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module], maps: Sequence[ParameterMap]):
        self._parts: list[tuple[torch.Tensor, Piece]] = []
        problems = []
        for chunk, expected in zip(chunks, maps, strict=True):
            held = {name: tensor for name, tensor in held_tensors(chunk) if not name.startswith(VALUE_HEAD)}
            shapes = {name: local_shape(parts) for name, parts in expected.items()}
            found = {name: tuple(tensor.shape) for name, tensor in held.items()}
            problems += [f"{name}: map {shapes.get(name)}, model {found.get(name)}"
                         for name in sorted(shapes.keys() | found.keys()) if shapes.get(name) != found.get(name)]
            self._parts += [(held[name], piece) for name, parts in expected.items() if name in held for piece in parts]
        if problems:
            raise ModelError("the parameter map does not fit the model: " + "; ".join(problems))

    def fill(self, source: Source) -> None:
        """Set every parameter; padding is 0."""
        with torch.no_grad():
            for tensor, piece in self._parts:
                tensor[piece.local_index].copy_(source(piece.hf_name, piece.hf_index))
                end = piece.local_index[0].stop
                tensor[end : end + piece.padding].zero_()

    def differing(self, manifest: WeightsManifest) -> list[str]:
        """Hugging Face names of the manifest's tensors whose bytes there are not this rank's, replicas included; of
        those in 8 bits, what this rank's become.

        LearnerError when the manifest was not made for this model.
        """
        published, wrong = attach(manifest), set()
        for held, piece in self._parts:
            if (tensor := published.get(piece.hf_name)) is None:
                continue
            if tensor.dtype not in (held.dtype, torch.float8_e4m3fn):
                raise LearnerError(f"weights manifest: {piece.hf_name!r} is {tensor.dtype}, expected {held.dtype}")
            if not same(held.detach()[piece.local_index], piece.hf_name, piece.hf_index, published):
                wrong.add(piece.hf_name)
        return sorted(wrong)

    def digests(self) -> dict[tuple[str, str], str]:
        """Checksum of each part that this rank has of a tensor, by the tensor's name and which part it is."""
        return {(piece.hf_name, str(piece.hf_index)): checksum(held.detach()[piece.local_index])
                for held, piece in self._parts}


def held_tensors(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters, and buffers that belong to the weights, such as a router's expert bias."""
    yield from module.named_parameters()
    stored = module.state_dict().keys()
    yield from ((name, buffer) for name, buffer in module.named_buffers() if name in stored)

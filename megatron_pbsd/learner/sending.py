"""A learner rank's side of a publication: its parts of each bucket, put into shared memory, sent, or put into files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from megatron_pbsd.learner.errors import LearnerError
from megatron_pbsd.models.decoder import Decoder
from megatron_pbsd.models.sglang import ServerParallel
from megatron_pbsd.platform.process_group import GroupPlace, WeightsGroup
from megatron_pbsd.resharding.arrival import payload
from megatron_pbsd.resharding.block_scale import in_8_bits
from megatron_pbsd.resharding.checksum import checksum
from megatron_pbsd.resharding.shares import Shares, parts, shares_of
from megatron_pbsd.resharding.stream import SLOTS, Bucket, Described, Parts, end_to_end, sent_by, tensors_in, unpack
from megatron_pbsd.resharding.wire import FLOAT8


class Sending:
    """parameters: by model chunk and the parameter map's name. tensors: all of the model's, as they are to be sent."""

    def __init__(self, rank: int, parameters: Mapping[tuple[int, str], torch.Tensor], tensors: Described,
                 device: torch.device):
        self._rank, self._parameters, self._tensors, self._device = rank, parameters, tensors, device
        self._parts: Parts | None = None
        self._group: WeightsGroup | None = None
        self._backend = ""
        self._flat: list[torch.Tensor] = []
        self._works: list[list[dist.Work]] = []
        self._shares: Shares = ()
        """Of each server's ranks, where these are sent theirs alone."""
        self._servers = 0

    def prepare(self, buckets: Sequence[Bucket]) -> None:
        """What the others send from now on. LearnerError when these are not all of the model's tensors."""
        given = {name: what for bucket in buckets for name, what in bucket.manifest.described.items()}
        expected = in_8_bits(self._tensors) if any(dtype == FLOAT8 for dtype, _ in given.values()) else self._tensors
        if wrong := sorted(name for name in given.keys() | expected.keys() if given.get(name) != expected.get(name)):
            raise LearnerError("the buckets are not of this model: " + "; ".join(
                f"{name}: {given.get(name)}, expected {expected.get(name)}" for name in wrong))
        self._parts, self._flat = Parts(buckets, self._rank, self._parameters), []

    def gather(self, number: int) -> None:
        """This rank's part of a bucket in shared memory."""
        self._parts.gather(number)

    def open_group(self, place: GroupPlace) -> None:
        """Rank 0 meets the engines there, in the place of those that it met before."""
        self.close_group()
        if self._rank == 0:
            self._group, self._backend = WeightsGroup(place, 0), place.backend
            self._works = [[] for _ in range(SLOTS)]

    def divide(self, decoder: Decoder, server: ServerParallel, servers: int) -> None:
        """The others in the group are the ranks of equal servers, one server after the other, for `scatter`."""
        if self._rank == 0:
            self._shares, self._servers, self._flat = shares_of(decoder, server), servers, []

    def broadcast(self, number: int) -> dict[str, str]:
        """A bucket from all ranks to rank 0, and from there to the engines, which goes on after this has returned:
        meanwhile the next one comes together in the other of two buckets. Rank 0 returns the checksums.

        LearnerError when an engine of an earlier bucket is gone. What ranks have sent is received all the same: what
        comes next must not be taken for it.
        """
        lost = self._finish(number % SLOTS) if self._works else None
        flat = self._together(number)
        if lost is not None:
            raise LearnerError(f"engines could not be sent to: {lost}")
        if flat is None:
            return {}
        self._works[number % SLOTS] = [self._group.broadcast(flat.cpu() if self._backend == "gloo" else flat)]
        return self._checksums(number, flat)

    def scatter(self, number: int) -> dict[str, str]:
        """The same, but that each of the engines' ranks is sent its shares alone, end to end: a bucket of these is on
        its way while one comes together."""
        flat = self._together(number)
        self.sent()
        if flat is None:
            return {}
        manifest, size = self._parts.buckets[number].manifest, len(self._shares)
        tensors, works = tensors_in(flat, manifest.entries), self._works[number % SLOTS]
        for rank, share in enumerate(self._shares):
            packed = end_to_end(parts(share, manifest, tensors))
            if packed is not None:
                packed = packed.cpu() if self._backend == "gloo" else packed
                works += [self._group.send(packed, 1 + server * size + rank) for server in range(self._servers)]
        return self._checksums(number, flat)

    def share(self, number: int, times: int) -> tuple[list[bytes], dict[str, str]]:
        """A bucket from all ranks to rank 0, which returns how `times` processes of its node may each map it
        (`arrival.payload`), and the checksums; its place is that of bucket `number` + 2 too."""
        flat = self._together(number)
        if flat is None:
            return [], {}
        return [payload(flat, self._parts.buckets[number].manifest) for _ in range(times)], self._checksums(
            number, flat)

    def store(self, number: int, path: str, held: Mapping[str, str]) -> dict[str, str]:
        """A bucket from all ranks to rank 0, which writes those of its tensors that have not these checksums into a
        safetensors file, if there are any, and returns the checksums of all."""
        flat = self._together(number)
        if flat is None:
            return {}
        tensors = tensors_in(flat.cpu(), self._parts.buckets[number].manifest.entries)
        checksums = {name: checksum(tensor) for name, tensor in tensors.items()}
        if changed := {name: t.clone() for name, t in tensors.items() if held.get(name) != checksums[name]}:
            save_file(changed, path)
        return checksums

    def _together(self, number: int) -> torch.Tensor | None:
        """The bucket, of all ranks, at rank 0."""
        bucket = self._parts.buckets[number]
        if self._rank != 0:
            if (packed := self._parts.pack(number)) is not None:
                dist.send(packed, 0)
            return None
        if not self._flat:
            size = max(bucket.manifest.nbytes for bucket in self._parts.buckets)
            count = 1 if self._shares else SLOTS
            self._flat = [torch.empty(size, dtype=torch.uint8, device=self._device) for _ in range(count)]
        flat = self._flat[number % len(self._flat)]
        self._parts.write(number, flat)
        for source, nbytes in sent_by(bucket).items():
            if source != 0:
                packed = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
                dist.recv(packed, source)
                unpack(bucket, source, packed, flat)
        return flat[: bucket.manifest.nbytes]

    def _checksums(self, number: int, flat: torch.Tensor) -> dict[str, str]:
        entries = self._parts.buckets[number].manifest.entries
        return {name: checksum(tensor) for name, tensor in tensors_in(flat, entries).items()}

    def sent(self) -> None:
        """Wait until all that has been sent is there. LearnerError when an engine is gone."""
        for lost in [self._finish(slot) for slot in range(len(self._works))]:
            if lost is not None:
                raise LearnerError(f"engines could not be sent to: {lost}")

    def close_group(self) -> None:
        """Whoever has joined it no longer waits."""
        group, self._group, self._works = self._group, None, []
        self._shares, self._flat = (), []
        if group is not None:
            group.close()

    def _finish(self, slot: int) -> Exception | None:
        works, self._works[slot] = self._works[slot], []
        try:
            for work in works:
                work.wait()
        except Exception as error:  # of whatever kind the backend has
            return error
        return None

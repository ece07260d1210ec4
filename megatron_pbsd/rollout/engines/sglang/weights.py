"""Weights into and out of a server: through shared memory that its processes map, files that they read, or a
torch.distributed group (`inside/pbsd_weights.py`).

Each of its processes takes its own part of each tensor and puts it where it belongs, by the plan for a server's layout
(resharding/shares.py), if that is what SGLang's own loader of the model would do; otherwise that loader is given whole
tensors.

A publication is a session of the server's: begin, then a call for each bucket, end. Requests that are under way are put
back into its queue before new weights arrive, and go on under them with their contexts read again.
"""

from __future__ import annotations

import base64
import json
import os
import pickle
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from megatron_pbsd.errors import did_you_mean
from megatron_pbsd.models.decoder import Decoder
from megatron_pbsd.models.errors import ModelError
from megatron_pbsd.models.sglang import ServerParallel
from megatron_pbsd.platform.process_group import GroupPlace
from megatron_pbsd.resharding.arrival import Arriving, Broadcast, Mapped, Scattered, TensorFile
from megatron_pbsd.resharding.checksum import MODULUS, checksum, named, ones
from megatron_pbsd.resharding.manifest import WeightsManifest, layout
from megatron_pbsd.resharding.shared_folder import sweep
from megatron_pbsd.resharding.shared_memory import ROOT, attach
from megatron_pbsd.resharding.shares import Share, Shares, shares_of
from megatron_pbsd.resharding.stream import Described
from megatron_pbsd.rollout.engines.sglang.client import Refused
from megatron_pbsd.rollout.engines.sglang.replies import WeightsName
from megatron_pbsd.rollout.engines.sglang.server import Server

NOTHING_CAME = "Failed to receive weights"


class ServerWeights:
    """The weights of a server's model, by the names that its checkpoint has for them.

    parallel: how its processes, which each hold a part of them, divide the model. shapes: of the model's tensors.
    ValueError when the server's model is not made of exactly these: where its code knows less than the checkpoint, it
    does so silently.
    """

    def __init__(self, server: Server, decoder: Decoder, parallel: ServerParallel,
                 shapes: Mapping[str, tuple[int, ...]]):
        self._server, self._ranks = server, parallel.size
        self._open = self._busy = False
        self._group: str | None = None
        try:
            shares, otherwise = shares_of(decoder, parallel), []
        except ModelError as error:
            shares, otherwise = [], [str(error)]
        with self._session(busy=False):
            reports = self._place(shapes, shares)
        if problems := placement_problems(reports):
            raise ValueError("; ".join(problems))
        dtypes = {name: dtype for report in reports for name, dtype in report["dtypes"].items()}
        self.tensors: Described = {name: (dtypes[name], tuple(shape)) for name, shape in shapes.items()}
        otherwise += dict.fromkeys(difference for report in reports for difference in report["otherwise"])
        self.divided = None if otherwise else parallel
        """How the model is divided, if its processes take their parts by plan."""
        self.taken = [0] * self._ranks
        """Bytes that each of them has taken since the last update began; 0 when they do not."""
        self._derives = any(report["derives"] for report in reports)
        if otherwise:
            print(f"pbsd: {server.name} is given whole tensors, as its model is not divided as planned: "
                  f"{shortened(otherwise)}", file=sys.stderr)

    def _place(self, shapes: Mapping[str, tuple[int, ...]], shares: Shares) -> list[dict[str, Any]]:
        with self._folder() as folder:
            paths = [folder / f"{rank}.json" for rank in range(len(shares))]
            for path, share in zip(paths, shares, strict=True):
                path.write_text(json.dumps([written(each) for parts in share.values() for each in parts]))
            return self._ask("place", layout("", {name: ("float32", shape) for name, shape in shapes.items()}),
                             shares=[str(path) for path in paths])

    def check(self, tensors: Described) -> None:
        """ValueError, with all problems, when these are not the model's."""
        if problems := misfits(tensors, self.tensors):
            raise ValueError("; ".join(problems))

    def begin(self, *, busy: bool) -> None:
        """Open a session, which ends one that was left open. busy: requests are under way; those that were when a
        session began that was left open still wait."""
        busy, self._busy = busy or self._busy, False
        self.taken = [0] * self._ranks
        if self._open:
            self._end(busy=False)
        self._begin("retract" if busy else None)
        self._busy = busy

    def load(self, bucket: Arriving) -> None:
        """Copy these tensors into the server's parameters. ValueError when they have not come; EngineDied when some
        may have been copied and others not."""
        if isinstance(bucket, Broadcast):
            problems = self._received(bucket)
        elif isinstance(bucket, Mapped):
            problems = self._mapped(bucket)
        elif isinstance(bucket, Scattered):
            problems = self._shares_received(bucket)
        else:
            problems = self._problems("take" if self.divided else "load", bucket, flush=True)
        if problems:
            raise self._server.condemned(f"of new weights it may hold a part: {'; '.join(problems)}")

    def end(self, version: int) -> None:
        """Everything has been loaded. EngineDied when the model cannot be used all the same."""
        if self.divided and self._derives and (problems := self._problems("finish", layout("", {}))):
            raise self._server.condemned(f"its model cannot be used with new weights: {'; '.join(problems)}")
        weights = WeightsName(self._server.weights.owner, version)
        self._server.post("/update_weight_version", {"new_version": str(weights), "abort_all_requests": False})
        self._server.weights = weights
        busy, self._busy = self._busy, False
        self._end(busy)

    def read(self, manifest: WeightsManifest, *, busy: bool) -> None:
        """Copy the server's parameters to the manifest's tensors. ValueError when they do not fit."""
        self.check(manifest.described)
        with self._session(busy):
            self._read(attach(manifest))

    def checksums(self, *, busy: bool) -> dict[str, str]:
        """Of the server's parameters, by tensor: each process adds up what it has. Of a tensor of which two processes
        have another version of the same part, it says so instead."""
        with self._session(busy):
            reports = self._ask("sums", layout("", {}), names=list(self.tensors))
            if problems := [problem for report in reports for problem in report["problems"]]:
                raise ValueError("; ".join(dict.fromkeys(problems)))
            held = held_parts(reports)
            found = {name: together(held.get(name, ()), dtype, shape) for name, (dtype, shape) in self.tensors.items()}
            # Of a model that SGLang divides into parts which overlap, only tensors put together tell.
            for name in [name for name, value in found.items() if value is None]:
                dtype, shape = self.tensors[name]
                tensor = torch.empty(shape, dtype=getattr(torch, dtype))
                self._read({name: tensor})
                found[name] = checksum(tensor)
        return found

    def _read(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put these together of what each process writes that it has of them."""
        with self._folder() as folder:
            reports = self._ask("read", layout("", {}), names=list(tensors), parts=str(folder / "parts"))
            if problems := [problem for report in reports for problem in report["problems"]]:
                raise ValueError("; ".join(dict.fromkeys(problems)))
            for rank, report in enumerate(reports):
                with safe_open(folder / f"parts.{rank}", "pt") as file:
                    for number, (name, offset, shape, stride) in enumerate(report["parts"]):
                        whole = tensors[name]
                        whole.as_strided(shape, stride, whole.storage_offset() + offset).copy_(
                            file.get_tensor(str(number)))

    @contextmanager
    def _folder(self) -> Iterator[Path]:
        """That all of the server's processes see; for as long as it is used."""
        sweep()
        with tempfile.TemporaryDirectory(prefix=f"pbsd-{os.getpid()}-", dir=self._server.shared) as folder:
            yield Path(folder)

    def join(self, place: GroupPlace, rank: int) -> None:
        """The server's tensor-parallel ranks join as `rank` and those after it. ValueError when they cannot."""
        group, self._group = self._group, place.name
        try:
            if group is not None:
                self._server.post("/destroy_weights_update_group", {"group_name": group})
            self._server.post("/init_weights_update_group", {
                "master_address": place.host, "master_port": place.port, "rank_offset": rank,
                "world_size": place.size, "group_name": place.name, "backend": place.backend})
        except Refused as error:
            raise ValueError(f"the server refuses a group for weights: {error.message}") from error

    @contextmanager
    def _session(self, busy: bool) -> Iterator[None]:
        """For looking at weights; also in the middle of a session that changes them."""
        if self._open:
            yield
            return
        self._begin("in_place" if busy else None)
        try:
            yield
        finally:
            self._end(busy)

    def _begin(self, pause: str | None) -> None:
        """pause: what becomes of requests meanwhile, `retract`: their contexts are read again afterwards."""
        if pause:
            self._server.post("/pause_generation", {"mode": pause})
        self._server.post("/begin_weight_update", {"selector": "target"})
        self._open = True

    def _end(self, busy: bool) -> None:
        self._open = False
        if not self._server.closed:
            self._server.post("/end_weight_update")
            if busy:
                self._server.post("/continue_generation")

    def _received(self, bucket: Broadcast) -> list[str]:
        """What went wrong with loading. ValueError when nothing came."""
        entries = bucket.manifest.entries
        try:
            self._server.post("/update_weights_from_distributed", {
                "names": [entry.name for entry in entries], "dtypes": [entry.dtype for entry in entries],
                "shapes": [list(entry.shape) for entry in entries], "group_name": bucket.group,
                "load_format": "flattened_bucket", "selector": "target", "flush_cache": True})
        except Refused as error:
            if error.message.startswith(NOTHING_CAME):
                raise ValueError(f"nothing came in group {bucket.group!r}: {error.message}") from error
            return [error.message]
        return []

    def _shares_received(self, bucket: Scattered) -> list[str]:
        """The same."""
        problems = self._problems("receive", bucket.manifest, flush=True, group=bucket.group)
        if nothing := [problem for problem in problems if problem.startswith(NOTHING_CAME)]:
            raise ValueError(f"nothing came in group {bucket.group!r}: {'; '.join(nothing)}")
        return problems

    def _mapped(self, bucket: Mapped) -> list[str]:
        """What went wrong."""
        try:
            self._server.post("/update_weights_from_tensor", {
                "serialized_named_tensors": [base64.b64encode(each).decode("ascii") for each in bucket.payloads],
                "load_format": "flattened_bucket", "selector": "target", "flush_cache": True})
        except Refused as error:
            return [error.message]
        return []

    def _problems(self, function: str, given: WeightsManifest | TensorFile, flush: bool = False,
                  **more: Any) -> list[str]:
        """Of all ranks, each once."""
        try:
            reports = self._ask(function, given, flush, **more)
        except Refused as error:
            return [f"the server refuses: {error.message}"]
        self.taken = [taken + report["taken"] for taken, report in zip(self.taken, reports, strict=True)]
        return list(dict.fromkeys(problem for report in reports for problem in report["problems"]))

    def _ask(self, function: str, given: WeightsManifest | TensorFile, flush: bool = False,
             **more: Any) -> list[dict[str, Any]]:
        """Each rank's report. more: of the request."""
        with self._folder() as folder:
            request = {**where(given), **more, "report": str(folder / "rank")}
            self._server.post("/update_weights_from_tensor", {
                "serialized_named_tensors": [payload(request)] * self._ranks,
                "load_format": f"pbsd_weights.{function}", "selector": "target", "flush_cache": flush})
            paths = [folder / f"rank.{rank}" for rank in range(self._ranks)]
            reports = [json.loads(path.read_text()) for path in paths if path.exists()]
        if len(reports) != self._ranks:
            raise Refused(200, f"{len(reports)} of its processes took part, expected {self._ranks}")
        return reports


@dataclass(frozen=True)
class HeldPart:
    """A part of a tensor that ranks have, and the sums of its bits and of ones (`resharding.checksum.part_sums`).

    place: offset, shape and strides of it in the tensor.
    """

    rank: int
    place: tuple[Any, ...]
    bits: int
    ones: int


def held_parts(reports: Sequence[Mapping[str, Any]]) -> dict[str, list[HeldPart]]:
    """By tensor."""
    found: dict[str, list[HeldPart]] = {}
    for rank, report in enumerate(reports):
        for name, offset, shape, stride, bits, number in report["sums"]:
            axes = [(size, step) for size, step in zip(shape, stride, strict=True) if size != 1]
            if 0 not in shape:
                found.setdefault(name, []).append(HeldPart(rank, (offset, tuple(axes)), bits, number))
    return found


def together(parts: Sequence[HeldPart], dtype: str, shape: Sequence[int]) -> str | None:
    """The tensor's checksum; None when its parts do not tell, because they overlap or leave something out."""
    first: dict[tuple[Any, ...], HeldPart] = {}
    for part in parts:
        same = first.setdefault(part.place, part)
        if same.bits != part.bits:
            return f"ranks {same.rank} and {part.rank} have different versions of the same part"
    if sum(part.ones for part in first.values()) % MODULUS != ones(shape):
        return None
    return named(getattr(torch, dtype), shape, sum(part.bits for part in first.values()))


def where(given: WeightsManifest | TensorFile) -> dict[str, Any]:
    """As `inside/pbsd_weights.py` wants to be told."""
    if isinstance(given, TensorFile):
        return {"file": given.path, "names": list(given.names)}
    return {"segment": str(ROOT / given.segment), "nbytes": given.nbytes,
            "entries": [[e.name, e.dtype, list(e.shape), e.offset] for e in given.entries]}


def written(share: Share) -> list[Any]:
    """The same."""
    return [share.tensor, [[s.start, s.stop] for s in share.box],
            share.parameter, [[s.start, s.stop] for s in share.place]]


def shortened(reasons: Sequence[str], most: int = 3) -> str:
    left_out = len(reasons) - most
    return "; ".join(reasons[:most]) + (f"; and {left_out} more" if left_out > 0 else "")


def placement_problems(reports: Sequence[Mapping[str, Any]]) -> list[str]:
    """Each once. What some ranks have no place for belongs to others, as experts do; a tensor without any is wrong."""
    problems = [problem for report in reports for problem in report["problems"]]
    placed = {name for report in reports for name in report["dtypes"]}
    problems += [f"it has no place for tensor {name!r}" for name in reports[0]["tensors"] if name not in placed]
    return list(dict.fromkeys(problems))


def misfits(given: Described, expected: Described) -> list[str]:
    """How these tensors differ from those of the model."""
    unknown = [name for name in given if name not in expected]
    problems = [f"tensor {name!r} is missing" + did_you_mean(name, unknown) for name in expected if name not in given]
    problems += [f"tensor {name!r} is not a parameter of the model" + did_you_mean(name, expected) for name in unknown]
    for name, (dtype, shape) in given.items():
        if name in expected and (dtype, shape) != expected[name]:
            wanted, size = expected[name]
            problems.append(f"tensor {name!r} is {dtype}{list(shape)}, expected {wanted}{list(size)}")
    return problems


class _EmptyTensor:
    """Is unpickled as one; the server's unpickler allows little more."""

    def __reduce__(self) -> tuple[Any, ...]:
        return torch.Tensor, ()


def payload(request: Mapping[str, Any]) -> str:
    """A list of one named tensor, whose name is the request: the server hands nothing else to loaders."""
    return base64.b64encode(pickle.dumps([(json.dumps(request), _EmptyTensor())], protocol=4)).decode("ascii")

"""Weights into and out of a server, through a shared-memory segment that its processes map (`inside/pbsd_weights.py`).

A publication is a session of the server's: begin, then calls that name functions of ours, end. Requests that are under
way are put back into its queue before new weights arrive, and go on under them with their contexts read again.
"""

from __future__ import annotations

import base64
import json
import pickle
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megatron_pbsd.errors import did_you_mean
from megatron_pbsd.resharding.manifest import WeightsManifest, layout
from megatron_pbsd.resharding.shared_memory import ROOT, attach
from megatron_pbsd.rollout.engines.sglang.client import Refused
from megatron_pbsd.rollout.engines.sglang.replies import WeightsName
from megatron_pbsd.rollout.engines.sglang.server import Server

Described = Mapping[str, tuple[str, tuple[int, ...]]]
"""Tensor → dtype, shape."""


class ServerWeights:
    """The weights of a server's model, by the names that its checkpoint has for them.

    ranks: processes of the server that hold a part of them. shapes: of the model's tensors. ValueError when the
    server's model is not made of exactly these: where its code knows less than the checkpoint, it does so silently.
    """

    def __init__(self, server: Server, ranks: int, shapes: Mapping[str, tuple[int, ...]]):
        self._server, self._ranks = server, ranks
        with self._session(busy=False):
            reports = self._ask("place", layout("", {name: ("float32", shape) for name, shape in shapes.items()}))
        if problems := placement_problems(reports):
            raise ValueError("; ".join(problems))
        dtypes = {name: dtype for report in reports for name, dtype in report["dtypes"].items()}
        self.tensors: Described = {name: (dtypes[name], tuple(shape)) for name, shape in shapes.items()}

    def load(self, manifest: WeightsManifest, version: int, *, busy: bool) -> None:
        """Copy the manifest's tensors into the server's parameters.

        busy: requests are under way. ValueError, with all problems and nothing changed, when they do not fit;
        EngineDied when some may have been copied and others not.
        """
        self._fit(manifest)
        with self._session(busy):
            if problems := self._problems("load", manifest, flush=True):
                raise self._server.condemned(
                    f"weights version {version}: it may hold a part of them: {'; '.join(problems)}")
            weights = WeightsName(self._server.weights.owner, version)
            self._server.post("/update_weight_version", {"new_version": str(weights), "abort_all_requests": False})
            self._server.weights = weights

    def read(self, manifest: WeightsManifest, *, busy: bool) -> None:
        """Copy the server's parameters to the manifest's tensors. ValueError as of `load`."""
        self._fit(manifest)
        with self._session(busy, "in_place"):
            if problems := self._problems("read", manifest):
                raise ValueError("; ".join(problems))

    def _fit(self, manifest: WeightsManifest) -> None:
        attach(manifest)
        given = {entry.name: (entry.dtype, tuple(entry.shape)) for entry in manifest.entries}
        if problems := misfits(given, self.tensors):
            raise ValueError("; ".join(problems))

    @contextmanager
    def _session(self, busy: bool, pause: str = "retract") -> Iterator[None]:
        """pause: what becomes of requests meanwhile, `retract`: their contexts are read again afterwards."""
        if busy:
            self._server.post("/pause_generation", {"mode": pause})
        self._server.post("/begin_weight_update", {"selector": "target"})
        try:
            yield
        finally:
            if not self._server.closed:
                self._server.post("/end_weight_update")
                if busy:
                    self._server.post("/continue_generation")

    def _problems(self, function: str, manifest: WeightsManifest, flush: bool = False) -> list[str]:
        """Of all ranks, each once."""
        try:
            reports = self._ask(function, manifest, flush)
        except Refused as error:
            return [f"the server refuses: {error.message}"]
        return list(dict.fromkeys(problem for report in reports for problem in report["problems"]))

    def _ask(self, function: str, manifest: WeightsManifest, flush: bool = False) -> list[dict[str, Any]]:
        """Each rank's report."""
        with tempfile.TemporaryDirectory(prefix="pbsd-weights-") as folder:
            request = {
                "segment": str(ROOT / manifest.segment), "nbytes": manifest.nbytes,
                "entries": [[e.name, e.dtype, list(e.shape), e.offset] for e in manifest.entries],
                "report": str(Path(folder) / "rank")}
            self._server.post("/update_weights_from_tensor", {
                "serialized_named_tensors": [payload(request)] * self._ranks,
                "load_format": f"pbsd_weights.{function}", "selector": "target", "flush_cache": flush})
            reports = [json.loads(path.read_text()) for path in sorted(Path(folder).iterdir())]
        if len(reports) != self._ranks:
            raise Refused(200, f"{len(reports)} of its processes took part, expected {self._ranks}")
        return reports


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

"""Weights into and out of a server, through a shared-memory segment that its processes map (`inside/pbsd_weights.py`).

A publication is a session of the server's: begin, then calls that name functions of ours, end. Requests that are under
way are put back into its queue before new weights arrive, and go on under them with their contexts read again.
"""

from __future__ import annotations

import base64
import json
import pickle
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megatron_pbsd.resharding.manifest import TensorEntry, WeightsManifest
from megatron_pbsd.resharding.shared_memory import ROOT, attach
from megatron_pbsd.rollout.engines.sglang.client import Refused
from megatron_pbsd.rollout.engines.sglang.replies import WeightsName
from megatron_pbsd.rollout.engines.sglang.server import Server


class ServerWeights:
    """ranks: processes of the server that hold a part of the weights."""

    def __init__(self, server: Server, ranks: int):
        self._server, self._ranks = server, ranks
        self._placed: tuple[TensorEntry, ...] | None = None

    def load(self, manifest: WeightsManifest, version: int, *, busy: bool) -> WeightsName:
        """Copy the manifest's tensors into the server's parameters; its weights are then called as is returned.

        busy: requests are under way. ValueError, with all problems and nothing changed, when they do not fit;
        EngineDied when some may have been copied and others not.
        """
        attach(manifest)
        with self._session(busy, "retract"):
            self._place(manifest)
            if problems := self._ask("load", manifest, flush=True):
                raise self._server.condemned(f"weights version {version}: it holds a part of them: {'; '.join(problems)}")
            weights = WeightsName(self._server.weights.owner, version)
            self._server.post("/update_weight_version", {"new_version": str(weights), "abort_all_requests": False})
            self._server.weights = weights
        return weights

    def read(self, manifest: WeightsManifest, *, busy: bool) -> None:
        """Copy the server's parameters to the manifest's tensors. ValueError as of `load`."""
        attach(manifest)
        with self._session(busy, "in_place"):
            self._place(manifest)
            if problems := self._ask("read", manifest):
                raise ValueError("; ".join(problems))

    def _place(self, manifest: WeightsManifest) -> None:
        if manifest.entries == self._placed:
            return
        if problems := self._ask("place", manifest):
            raise ValueError("; ".join(problems))
        self._placed = manifest.entries

    @contextmanager
    def _session(self, busy: bool, mode: str) -> Iterator[None]:
        if busy:
            self._server.post("/pause_generation", {"mode": mode})
        self._server.post("/begin_weight_update", {"selector": "target"})
        try:
            yield
        finally:
            if not self._server.closed:
                self._server.post("/end_weight_update")
                if busy:
                    self._server.post("/continue_generation")

    def _ask(self, function: str, manifest: WeightsManifest, flush: bool = False) -> list[str]:
        """Problems of all ranks, each once."""
        with tempfile.TemporaryDirectory(prefix="pbsd-weights-") as folder:
            request = {
                "segment": str(ROOT / manifest.segment), "nbytes": manifest.nbytes,
                "entries": [[e.name, e.dtype, list(e.shape), e.offset] for e in manifest.entries],
                "report": str(Path(folder) / "rank")}
            try:
                self._server.post("/update_weights_from_tensor", {
                    "serialized_named_tensors": [payload(request)] * self._ranks,
                    "load_format": f"pbsd_weights.{function}", "selector": "target", "flush_cache": flush})
            except Refused as error:
                return [f"the server refuses: {error.message}"]
            reports = [json.loads(path.read_text()) for path in sorted(Path(folder).iterdir())]
        return problems_of(reports, self._ranks)


def problems_of(reports: list[Mapping[str, list[str]]], ranks: int) -> list[str]:
    """Each once. A tensor that some ranks have no place for belongs to others (experts do); one that none has is wrong."""
    if len(reports) != ranks:
        return [f"{len(reports)} of the server's ranks took part, expected {ranks}"]
    problems = [problem for report in reports for problem in report["problems"]]
    strange = set.intersection(*(set(report["unplaced"]) for report in reports))
    problems += [f"tensor {name!r} is not a parameter of the model" for name in sorted(strange)]
    return list(dict.fromkeys(problems))


class _EmptyTensor:
    """Is unpickled as one; the server's unpickler allows no more than that."""

    def __reduce__(self) -> tuple[Any, ...]:
        return torch.Tensor, ()


def payload(request: Mapping[str, Any]) -> str:
    """A list of one named tensor, whose name is the request: the server hands nothing else to loaders."""
    return base64.b64encode(pickle.dumps([(json.dumps(request), _EmptyTensor())], protocol=4)).decode("ascii")

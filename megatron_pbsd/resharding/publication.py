"""Publishing weights: from the learner to engines, in place, by whatever transport, and the proof that they arrived.

Each publication is checked three times, from cheap and exact to complete:

1. the learner ranks compare what is sent with their own parameters, replicas included;
2. each engine's checksums are compared with those of what was sent, tensor by tensor;
3. engine and learner score the same probe sequences. Equal bytes under a wrong name map or a wrong model would pass
   1 and 2 and fail here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from megatron_pbsd.batch import Batch
from megatron_pbsd.errors import PbsdError
from megatron_pbsd.resharding.manifest import WeightsManifest, layout
from megatron_pbsd.resharding.shared_memory import Segment, attach
from megatron_pbsd.resharding.transport import Members, PublicationError, Source, Transport


class Learner(Source, Protocol):
    def log_probs(self, batch: Batch) -> list[np.ndarray]: ...


class Engines(Members, Protocol):
    """Lists hold one entry per engine."""

    def write_weights(self, manifest: WeightsManifest, engine: int) -> None: ...
    def checksums(self) -> list[dict[str, str]]: ...
    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[np.ndarray]]: ...


@dataclass(frozen=True)
class Published:
    """Weights that every engine has. checksums: by tensor."""

    version: int
    checksums: Mapping[str, str]

    @property
    def digest(self) -> str:
        """Of all of them."""
        return hashlib.blake2b(json.dumps(self.checksums, sort_keys=True).encode(), digest_size=16).hexdigest()


class Publisher:
    """Owns the transport from construction to `close`.

    probe:      token sequences that engine and learner both score after each publication.
    tolerance:  largest |difference| of their log-probs (nats).
    engines_score:  called when the learner has scored the probe, and before the engines do.
    """

    def __init__(self, transport: Transport, source: Learner, target: Engines, probe: Sequence[Sequence[int]],
                 tolerance: float, engines_score: Callable[[], None] = lambda: None):
        self._transport, self._source, self._target = transport, source, target
        self._probe, self._tolerance = [list(tokens) for tokens in probe], tolerance
        self._engines_score = engines_score
        self._tensors = source.tensors()
        self.nbytes = layout("", self._tensors).nbytes
        """Size of the published weights."""
        self.published: Published | None = None
        """What was last published, and proved."""

    @property
    def keeps(self) -> bool:
        """Whether what was published last is somewhere besides learner and engines."""
        return self._transport.keeps

    def publish(self, version: int) -> dict[str, float]:
        """Move the newest weights to every engine as `version`. Metrics: weights/probe_max_abs (nats), weights/bytes.

        PublicationError names the engine and the tensors when they do not arrive bit for bit.
        """
        checksums = self._transport.send(version, self._target.names)
        for engine, held in zip(self._target.names, self._target.checksums(), strict=True):
            if wrong := _wrong(checksums, held):
                raise PublicationError(f"version {version}: {engine} holds other bytes than the learner in {wrong}")
        worst = self._compare(version)
        self.published = Published(version, checksums)
        return {"weights/probe_max_abs": worst, "weights/bytes": float(self.nbytes)}

    def restore(self, engine: str) -> None:
        """Give an engine that has been started anew what was published last. PublicationError as from `publish`."""
        published = self.published
        self._transport.restore(published.version, engine)
        (held,) = self._target.wait("checksums", self._target.start("checksums", only=[engine]))
        if wrong := _wrong(published.checksums, held):
            raise PublicationError(
                f"version {published.version}: {engine}, started anew, holds other bytes than the others in {wrong}")

    def copies(self) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        """Where weights are when the learner is lost, and they, one after the other: what the transport has kept, and
        what each engine that answers has, which it writes into the same memory.

        To be compared with `published`: the learner may have been publishing, or may still be.
        """
        yield from self._transport.copies()
        segment = Segment(self.nbytes)
        try:
            manifest = layout(segment.name, self._tensors)
            for number, name in enumerate(self._target.names):
                try:
                    self._target.write_weights(manifest, number)
                except (PbsdError, ValueError):  # It has died, or is on another machine, without this memory.
                    continue
                yield name, attach(manifest)
        finally:
            segment.close()

    def _compare(self, version: int) -> float:
        expected = self._source.log_probs(Batch({"tokens": [np.array(tokens) for tokens in self._probe]}))
        self._engines_score()
        worst = 0.0
        for engine, scores in zip(self._target.names, self._target.score(self._probe), strict=True):
            difference = max(float(abs(a - b).max()) for a, b in zip(expected, scores, strict=True))
            if not difference <= self._tolerance:
                raise PublicationError(
                    f"version {version}: log-probs of {engine} differ from the learner's by {difference:.3g} nats, "
                    f"expected at most rollout.probe_tolerance = {self._tolerance:g}. All tensors are bit-identical, "
                    "so the model code or the parameter map of this family differs between the two: "
                    + ", ".join(self._tensors))
            worst = max(worst, difference)
        return worst

    def close(self) -> None:
        self._transport.close()


def _wrong(sent: Mapping[str, str], held: Mapping[str, str]) -> list[str]:
    return [name for name, value in sent.items() if held.get(name) != value]

"""Publishing weights: learner -> shared segment -> engines, in place, and the proof that they arrived.

Each publication is checked three times, from cheap and exact to complete:

1. the learner ranks compare the segment with their own parameters, replicas included;
2. each engine's checksums are compared with the segment's, tensor by tensor;
3. engine and learner score the same probe sequences. Equal bytes under a wrong name map or a wrong model would pass
   1 and 2 and fail here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from megatron_pbsd.batch import Batch
from megatron_pbsd.errors import PbsdError
from megatron_pbsd.resharding.manifest import WeightsManifest, checksum, layout
from megatron_pbsd.resharding.shared_memory import Segment, attach


class PublicationError(PbsdError):
    """Engines do not hold the learner's weights; the message names the tensors."""

    component = "weights"


class Source(Protocol):
    """The learner, all ranks of it."""

    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]: ...
    def publish(self, manifest: WeightsManifest) -> None: ...
    def differing(self, manifest: WeightsManifest) -> list[str]: ...
    def log_probs(self, batch: Batch) -> list[np.ndarray]: ...


class Target(Protocol):
    """The engines, all of them; lists hold one entry per engine."""

    names: Sequence[str]

    def update_weights(self, manifest: WeightsManifest, version: int) -> None: ...
    def write_weights(self, manifest: WeightsManifest, engine: int) -> None: ...
    def restore_weights(self, manifest: WeightsManifest, version: int, engine: str) -> dict[str, str]: ...
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
    """Owns the segment from construction to `close`.

    probe:      token sequences that engine and learner both score after each publication.
    tolerance:  largest |difference| of their log-probs (nats).
    """

    def __init__(self, source: Source, target: Target, probe: Sequence[Sequence[int]], tolerance: float):
        self._source, self._target = source, target
        self._probe, self._tolerance = [list(tokens) for tokens in probe], tolerance
        tensors = source.tensors()
        self._segment = Segment(layout("", tensors).nbytes)
        self._manifest = layout(self._segment.name, tensors)
        self.published: Published | None = None
        """What was last published, and proved."""

    def publish(self, version: int) -> dict[str, float]:
        """Move the newest weights to every engine as `version`. Metrics: weights/probe_max_abs (nats), weights/bytes.

        PublicationError names the engine and the tensors when they do not arrive bit for bit.
        """
        self._source.publish(self._manifest)
        if differing := self._source.differing(self._manifest):
            raise PublicationError(f"version {version}: learner ranks disagree with what was published of {differing}")
        self._target.update_weights(self._manifest, version)
        checksums = {name: checksum(tensor) for name, tensor in attach(self._manifest).items()}
        for engine, held in zip(self._target.names, self._target.checksums(), strict=True):
            if wrong := [name for name, value in checksums.items() if held.get(name) != value]:
                raise PublicationError(f"version {version}: {engine} holds other bytes than the learner in {wrong}")
        worst = self._compare(version)
        self.published = Published(version, checksums)
        return {"weights/probe_max_abs": worst, "weights/bytes": float(self._manifest.nbytes)}

    def restore(self, engine: str) -> None:
        """Give an engine that has been started anew what was published last. PublicationError as from `publish`."""
        published = self.published
        held = self._target.restore_weights(self._manifest, published.version, engine)
        if wrong := [name for name, value in published.checksums.items() if held.get(name) != value]:
            raise PublicationError(
                f"version {published.version}: {engine}, started anew, holds other bytes than the others in {wrong}")

    def copies(self) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        """Where weights are when the learner is lost, and they, one after the other in the same memory: what is left in
        the segment, and what each engine that answers has, which it writes there.

        To be compared with `published`: the learner may have been publishing, or may still be.
        """
        yield "the segment", attach(self._manifest)
        for number, name in enumerate(self._target.names):
            try:
                self._target.write_weights(self._manifest, number)
            except PbsdError:
                continue
            yield name, attach(self._manifest)

    def _compare(self, version: int) -> float:
        expected = self._source.log_probs(Batch({"tokens": [np.array(tokens) for tokens in self._probe]}))
        worst = 0.0
        for engine, scores in zip(self._target.names, self._target.score(self._probe), strict=True):
            difference = max(float(abs(a - b).max()) for a, b in zip(expected, scores, strict=True))
            if not difference <= self._tolerance:
                raise PublicationError(
                    f"version {version}: log-probs of {engine} differ from the learner's by {difference:.3g} nats, "
                    f"expected at most rollout.probe_tolerance = {self._tolerance:g}. All tensors are bit-identical, "
                    "so the model code or the parameter map of this family differs between the two: "
                    + ", ".join(entry.name for entry in self._manifest.entries))
            worst = max(worst, difference)
        return worst

    @property
    def nbytes(self) -> int:
        """Size of the published weights."""
        return self._manifest.nbytes

    def close(self) -> None:
        self._segment.close()

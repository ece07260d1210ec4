"""Weights through files that learner and engines see: of all tensors, or of those that have changed. Learner rank 0
writes them, to which the others send their parts of each bucket.

    <folder>/version_7/bucket-0000.safetensors …    tensors by their names in checkpoints
    <folder>/version_7/weights.json                 {"version", "base", "checksums": of all tensors,
                                                    "files": {file: [names]}}; base: the version that has the other
                                                    tensors, or null

There are the last version with all tensors and what has been written since. A version is in its place when it is
complete; engines keep what they have until then.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from megatron_pbsd.resharding.arrival import TensorFile, read
from megatron_pbsd.resharding.plan import Plan
from megatron_pbsd.resharding.stream import messages
from megatron_pbsd.resharding.transport import Members, Source, Update, check_ranks, prepare, replicas_that_differ

MANIFEST = "weights.json"


class Written:
    """A version's files. base: the version that has the other tensors. checksums: of all tensors."""

    def __init__(self, folder: Path, version: int, base: int | None):
        self.folder, self.version, self.base = folder, version, base
        self.checksums: dict[str, str] = {}
        self.files: dict[str, list[str]] = {}

    def complete(self, folder: Path) -> None:
        about = {"version": self.version, "base": self.base, "checksums": self.checksums, "files": self.files}
        (self.folder / MANIFEST).write_text(json.dumps(about, indent=1), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        self.folder.rename(folder)
        self.folder = folder

    def tensor_files(self) -> list[TensorFile]:
        return [TensorFile(str(self.folder / name), tuple(names)) for name, names in self.files.items()]


class DiskTransport:
    """folder: of these files alone. deltas: how many versions may need the one before, after one that does not."""

    keeps = True

    def __init__(self, source: Source, target: Members, plan: Plan, folder: Path, deltas: int):
        self._source, self._target, self._folder, self._deltas = source, target, folder, deltas
        self._buckets = messages(plan)
        self._tensors = prepare(source, self._buckets)
        self._chain: list[Written] = []
        """What the last version is made of: all tensors, and then changes."""
        folder.mkdir(parents=True, exist_ok=True)
        self._remove()

    def send(self, version: int, engines: Sequence[str]) -> dict[str, str]:
        base = self._base(version, engines)
        written = self._write(version, base)
        with Update(self._target, engines, self._tensors, version, base and base.version):
            self._load(written, engines)
        self._chain = [*self._chain, written] if base else [written]
        self._remove()
        return written.checksums

    def _remove(self) -> None:
        """What is not needed any more, of this run or of one before."""
        kept = {written.folder for written in self._chain}
        for old in self._folder.glob("version_*"):
            if old not in kept and (old.suffix == ".partial" or (old / MANIFEST).exists()):
                shutil.rmtree(old)

    def _base(self, version: int, engines: Sequence[str]) -> Written | None:
        """What engines have and the next version may build on; None when it is due to be whole, or has to be because
        they have something else."""
        if not 0 < len(self._chain) <= self._deltas or self._chain[-1].version == version:
            return None
        last = self._chain[-1]
        for engine, held in zip(engines, self._target.wait(
                "checksums", self._target.start("checksums", only=engines)), strict=True):
            if wrong := [name for name, value in last.checksums.items() if held.get(name) != value]:
                print(f"pbsd: weights version {version} is written whole: {engine} has not version {last.version}, "
                      f"on which it was to build, in {wrong}", file=sys.stderr)
                return None
        return last

    def _write(self, version: int, base: Written | None) -> Written:
        draft = self._folder / f"version_{version}.{os.getpid()}.partial"
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
        written = Written(draft, version, base and base.version)
        held = base.checksums if base else {}
        digests = self._source.wait("digests", self._source.start("digests"))
        check_ranks(version, [replicas_that_differ(digests)])
        for number in range(len(self._buckets)):
            path = draft / f"bucket-{number:04d}.safetensors"
            checksums = self._source.wait("store", self._source.start("store", number, str(path), held))[0]
            written.checksums |= checksums
            if changed := [name for name, value in checksums.items() if held.get(name) != value]:
                written.files[path.name] = changed
        written.complete(self._folder / f"version_{version}")
        return written

    def _load(self, written: Written, engines: Sequence[str]) -> None:
        for file in written.tensor_files():
            self._target.wait("load", self._target.start("load", file, only=engines))

    def restore(self, version: int, engine: str) -> None:
        with Update(self._target, [engine], self._tensors, version):
            for written in self._chain:
                self._load(written, [engine])

    def copies(self) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        if self._chain:
            yield f"the files in {self._folder}", {
                name: tensor for written in self._chain for file in written.tensor_files()
                for name, tensor in read(file).items()}

    def close(self) -> None:
        """The files stay: engines may read them yet."""

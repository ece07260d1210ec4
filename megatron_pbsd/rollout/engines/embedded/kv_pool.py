"""KV in host memory: of requests that have lost their slot, or may go on at another engine.

One file per request, in shared memory, in the folder of the engine that ran its last chunk. A file is rows, one per
token: the token's id (int64), then what the caller keeps of it. It only grows at its end, so that what an engine that
was killed in the middle of a row has left is still whole rows and a rest.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_pbsd.rollout.engines.embedded.kv_cache import common_prefix

TOKEN_BYTES = 8
Rows = Callable[[int, int], np.ndarray]


@dataclass(frozen=True)
class PoolPlace:
    """folder: shared by the engines of a run, in which each has one of its own. budget: bytes that one engine may keep.

    shared: another engine may go on with any request, so that its KV is parked as each chunk ends; otherwise only KV
        that loses its slot is.
    """

    folder: str
    budget: int
    shared: bool


@dataclass
class PoolCounters:
    """See `protocol.KVCounters`."""

    parks: int = 0
    parked_tokens: int = 0
    moved_out: int = 0
    dropped_tokens: int = 0
    bytes: int = 0


@dataclass
class _Entry:
    """width: bytes of a row, token included."""

    form: str
    tokens: list[int]
    width: int

    @property
    def nbytes(self) -> int:
        return len(self.tokens) * self.width


class KVPool:
    """One engine's part of the pool. `form`: whatever the meaning of a row depends on, weights included; what was
    parked in another form is not found."""

    def __init__(self, place: PoolPlace, engine: str):
        self.place = place
        self.counters = PoolCounters()
        self._root, self._folder = Path(place.folder), Path(place.folder) / engine
        shutil.rmtree(self._folder, ignore_errors=True)  # of one that died under this name
        self._folder.mkdir(parents=True)
        # Insertion order: the first entry was parked or taken the longest ago.
        self._parked: dict[str, _Entry] = {}

    def park(self, request_id: str, form: str, tokens: list[int], rows: Rows) -> None:
        """Keep the rows of `tokens`, of which those at [start, end) are `rows(start, end)`, uint8 [end - start, width].

        Rows of a common prefix are there already. The longest untouched go first where room is short.
        """
        entry = self._parked.pop(request_id, None)
        known = self._common(request_id, entry, form, tokens)
        if entry is not None:
            self._shorten(request_id, entry, known)
        if len(tokens) > known:
            entry = self._extend(request_id, form, tokens, known, rows(known, len(tokens)))
        if entry is not None:
            self._parked[request_id] = entry

    def _extend(self, request_id: str, form: str, tokens: list[int], known: int, new: np.ndarray) -> _Entry | None:
        """Add rows to the `known` ones; None, and nothing is left, where there is no room."""
        ids = np.array(tokens[known:], np.int64).view(np.uint8).reshape(-1, TOKEN_BYTES)
        entry, added = _Entry(form, tokens.copy(), new.shape[1] + TOKEN_BYTES), np.concatenate([ids, new], axis=1)
        path = self._path(request_id, form)
        if not (self._make_room(added.nbytes) and _write(path, added, "ab" if known else "wb")):
            path.unlink(missing_ok=True)
            self.counters.bytes -= known * entry.width
            self.counters.dropped_tokens += len(tokens)
            return None
        self.counters.bytes += added.nbytes
        self.counters.parks += 1
        self.counters.parked_tokens += len(tokens) - known
        return entry

    def _shorten(self, request_id: str, entry: _Entry, count: int) -> None:
        """Keep the first `count` rows."""
        if count == len(entry.tokens):
            return
        path = self._path(request_id, entry.form)
        if count:
            os.truncate(path, count * entry.width)
        else:
            path.unlink(missing_ok=True)
        self.counters.bytes -= (len(entry.tokens) - count) * entry.width
        del entry.tokens[count:]

    def _make_room(self, needed: int) -> bool:
        if needed > self.place.budget:
            return False
        while self.counters.bytes + needed > self.place.budget and self._parked:
            request_id = next(iter(self._parked))
            entry = self._parked.pop(request_id)
            self.counters.dropped_tokens += len(entry.tokens)
            self._remove(request_id, entry)
        return self.counters.bytes + needed <= self.place.budget

    def _remove(self, request_id: str, entry: _Entry | None) -> None:
        if entry is not None:
            self._path(request_id, entry.form).unlink(missing_ok=True)
            self.counters.bytes -= entry.nbytes

    def take(self, request_id: str, form: str, tokens: list[int], width: int, source: str) -> bool:
        """Move what engine `source` has parked of the request here; whether it had any that `tokens` begin with."""
        theirs = self._root / source / self._path(request_id, form).name
        ours = self._path(request_id, form)
        row = width + TOKEN_BYTES
        self.release(request_id)
        try:
            os.replace(theirs, ours)
            whole = ours.stat().st_size // row
            os.truncate(ours, whole * row)
        except FileNotFoundError:
            return False
        ids = np.fromfile(ours, np.uint8).reshape(whole, row)[:, :TOKEN_BYTES]
        entry = _Entry(form, ids.copy().view(np.int64).reshape(-1).tolist(), row)
        self.counters.bytes += entry.nbytes
        self._shorten(request_id, entry, common_prefix(entry.tokens, tokens))
        if not entry.tokens:
            return False
        self._make_room(0)
        self._parked[request_id] = entry
        return True

    def find(self, request_id: str, form: str, tokens: list[int]) -> int:
        """How many of `tokens`, from the first on, have their rows here."""
        return self._common(request_id, self._parked.get(request_id), form, tokens)

    def _common(self, request_id: str, entry: _Entry | None, form: str, tokens: list[int]) -> int:
        """Rows that `tokens` and an entry have in common: none if the entry's file is not what it should be."""
        if entry is None or entry.form != form:
            return 0
        try:
            whole = self._path(request_id, form).stat().st_size == entry.nbytes
        except FileNotFoundError:
            return 0
        return common_prefix(entry.tokens, tokens) if whole else 0

    def read(self, request_id: str, start: int, end: int) -> np.ndarray:
        """uint8 [end - start, width]: rows that `find` has found."""
        entry = self._parked[request_id]
        path = self._path(request_id, entry.form)
        rows = np.fromfile(path, np.uint8, (end - start) * entry.width, offset=start * entry.width)
        return rows.reshape(end - start, entry.width)[:, TOKEN_BYTES:]

    def release(self, request_id: str) -> None:
        self._remove(request_id, self._parked.pop(request_id, None))

    def hand_over(self, request_id: str) -> None:
        """It is another engine's from now on, which takes the file."""
        if (entry := self._parked.pop(request_id, None)) is not None:
            self.counters.bytes -= entry.nbytes
            self.counters.moved_out += 1

    def clear(self) -> None:
        for request_id in list(self._parked):
            self.release(request_id)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._parked

    def _path(self, request_id: str, form: str) -> Path:
        digest = hashlib.blake2b(request_id.encode(), digest_size=16).hexdigest()
        return self._folder / f"{digest}-{form}"


def _write(path: Path, rows: np.ndarray, mode: str) -> bool:
    """Whether the host had the memory."""
    try:
        with open(path, mode, buffering=0) as file:
            data = rows.reshape(-1).data
            while len(data):
                data = data[file.write(data) :]
    except OSError:
        return False
    return True

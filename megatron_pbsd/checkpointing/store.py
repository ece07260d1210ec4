"""Checkpoints of a run on disk: written in the background, all or nothing, verified, and only those that are asked for.

    <folder>/step_40/learner/…         the learner's distributed checkpoint (torch_dist.py)
    <folder>/step_40/manifest.json     what it is, and every file's size and checksum
    <folder>/step_60.1f0c.partial/…    being written, or left by a run that died
    <folder>/step_40.replaced/…        was step_40 until the new one of that name is in its place
    <folder>/latest, best              names of checkpoints
    <folder>/recovered/…               weights that are newer than any of them (recovery.py)
    <folder>/.lock                     held by the run that writes here

A checkpoint has its name only once all of it is on disk, and `latest` names it only after that: whatever is killed, and
wherever, what had been committed stays.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megatron_pbsd.checkpointing import recovery
from megatron_pbsd.checkpointing.errors import CheckpointError
from megatron_pbsd.checkpointing.files import sync, write_synced
from megatron_pbsd.checkpointing.fsck import LEARNER, gaps, verify
from megatron_pbsd.checkpointing.manifest import (
    Contents,
    FileRecord,
    Manifest,
    checksum,
    files_in,
    read_manifest,
    write_manifest,
)
from megatron_pbsd.checkpointing.retention import Candidate, best, reasons
from megatron_pbsd.checkpointing.torch_dist import Reader, assemble, failures, unfinished
from megatron_pbsd.config import CheckpointConfig
from megatron_pbsd.errors import UsageError

LATEST = "latest"
BEST = "best"
PARTIAL = ".partial"
REPLACED = ".replaced"
LOCK = ".lock"
FULL_BELOW = 1 << 20
"""Bytes of free space under which a failed write is put down to a full disk."""
LONGEST_POLL_S = 0.5


@dataclass(frozen=True)
class Draft:
    """A checkpoint in the making. writers: names of those that write into its `LEARNER` folder."""

    folder: Path
    contents: Contents
    expected_bytes: int
    writers: tuple[str, ...]


class CheckpointStore:
    """The checkpoints of a run that goes on. A context manager: inside, no other run writes to `folder`.

    policy:     which checkpoints stay.
    deadline_s: after this long without a byte from writers that have not closed, they are declared hung.

        with CheckpointStore(folder, config.checkpoint, 300) as store:
            with store.writing(Contents(step=20), expected_bytes, writers=["__0_0"]) as partial:
                ...                       # start the writers, or write
            store.check()                 # raises what has gone wrong in the background, if anything has
            store.finish()                # waits; leaving without it gives up what writers have not written
    """

    def __init__(self, folder: str | Path, policy: CheckpointConfig, deadline_s: float):
        self.folder, self.policy, self.deadline_s = Path(folder), policy, deadline_s
        self._given_up = threading.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._committing: Future | None = None
        self._jobs: list[Future] = []

    def __enter__(self) -> CheckpointStore:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(self.folder / LOCK)
        _restore(self.folder)
        if self._lock is not None:
            _clear(self.folder)
        return self

    def __exit__(self, *exception: object) -> None:
        self._given_up.set()
        self._thread.shutdown(wait=True, cancel_futures=True)
        if self._lock is not None:
            os.close(self._lock)

    @contextmanager
    def writing(
        self, contents: Contents, expected_bytes: int, writers: Sequence[str] = (),
        then: Callable[[Path], None] | None = None,
    ) -> Iterator[Path]:
        """A folder to write into; after the block, and when the writers have closed, it becomes the newest checkpoint.

        That happens in the background, one checkpoint after the other: this waits until the one before is committed.
        expected_bytes: estimate of what will be written; less free space is a CheckpointError before anything is.
        writers:        names of the `torch_dist.Writer`s that the block starts in the folder's `LEARNER`; one that
                        fails has it reported there (`torch_dist.report_failure`).
        then:           is given the committed checkpoint, in the background, before the next one can replace it.

        What fails later is a CheckpointError of the next call, and leaves the previous checkpoint the newest.
        """
        if self._committing is not None:
            self._committing.exception()
        self.check()
        self._require_space(expected_bytes)
        partial = self.folder / f"step_{contents.step}.{secrets.token_hex(4)}{PARTIAL}"
        draft = Draft(partial, contents, expected_bytes, tuple(writers))
        with self._all_or_nothing(draft):
            partial.mkdir()
            yield partial
        committing = self._thread.submit(self._commit, draft)
        self._jobs.append(committing)
        if then is not None:
            self._jobs.append(self._thread.submit(lambda: then(committing.result())))
        self._committing = committing

    def check(self) -> None:
        """Raise what has gone wrong in the background."""
        done = [job for job in self._jobs if job.done()]
        self._jobs = [job for job in self._jobs if job not in done]
        for job in done:
            job.result()

    def finish(self) -> None:
        """Wait for all that is being done in the background, and raise what goes wrong with it."""
        for job in self._jobs:
            job.exception()
        self.check()

    def newest(self) -> Path | None:
        """`select(LATEST)`, None when there is no checkpoint yet."""
        return self.select(LATEST) if (self.folder / LATEST).exists() or complete(self.folder) else None

    def select(self, name: str) -> Path:
        """The checkpoint of this name, or that `latest` or `best` names, its files verified.

        CheckpointError naming every file that is missing or damaged with the tensors in it, and the next older
        checkpoint that is not; UsageError when there is none of this name.
        """
        path = resolve(self.folder, name)
        try:
            verify(path)
        except CheckpointError as error:
            older = [p for p in complete(self.folder) if step_of(p) < step_of(path)]
            good = next((p for p in sorted(older, key=step_of, reverse=True) if _is_good(p)), None)
            raise CheckpointError(f"{path.name} is not what was written: {error}. " + (
                f"The next older checkpoint is good: go on from it with --resume {good.name}" if good
                else "No older checkpoint is good")) from error
        return path

    def _commit(self, draft: Draft) -> Path:
        with self._all_or_nothing(draft):
            known = self._gathered(draft)
            partial, files = draft.folder, {}
            for path in files_in(partial):
                name = str(path.relative_to(partial))
                files[name] = FileRecord(path.stat().st_size, known.get(name) or checksum(path))
                if name not in known:
                    sync(path)
            write_manifest(partial, Manifest(draft.contents, time.time(), files))
            for folder in (*(p for p in partial.rglob("*") if p.is_dir()), partial):
                sync(folder)
            final = self._in_place(draft)
            self._point(LATEST, final.name)
            self._retain()
            recovery.drop(self.folder, draft.contents.step)
        return final

    def _gathered(self, draft: Draft) -> dict[str, str]:
        """Wait for the writers and make one checkpoint of what they wrote; path → checksum, where a writer took it."""
        if not draft.writers:
            return {}
        folder = draft.folder / LEARNER
        self._await(folder, draft)
        checksums = assemble(folder, draft.writers)
        if problems := gaps(Reader(folder)):
            raise CheckpointError("the ranks' parts do not make a checkpoint: " + "; ".join(problems))
        return {f"{LEARNER}/{file}": value for file, value in checksums.items()}

    def _await(self, folder: Path, draft: Draft) -> None:
        began = heard = time.monotonic()
        size = 0
        while missing := unfinished(folder, draft.writers):
            if failed := failures(folder, missing):
                raise CheckpointError("; ".join(
                    f"{folder / name} was not written: {reason.strip()}" for name, reason in failed.items()))
            now, written = time.monotonic(), sum(path.stat().st_size for path in folder.glob("*.distcp"))
            heard, size = (now, written) if written != size else (heard, size)
            if now - heard > self.deadline_s:
                raise CheckpointError(f"{folder}: nothing was written for {self.deadline_s:g} s, and not all is there "
                                      f"of {missing}")
            if self._given_up.wait(min(LONGEST_POLL_S, 0.005 + (now - began) / 10)):
                raise CheckpointError(f"step {draft.contents.step} was given up when the run ended: {missing} had not "
                                      "been written")

    def _in_place(self, draft: Draft) -> Path:
        final = self.folder / f"step_{draft.contents.step}"
        replaced = final.with_name(final.name + REPLACED)
        if final.exists():
            final.rename(replaced)
        draft.folder.rename(final)
        sync(self.folder)
        if replaced.exists():
            _remove(replaced)
        return final

    def _point(self, pointer: str, name: str) -> None:
        temporary = self.folder / f"{pointer}.new"
        write_synced(temporary, (name + "\n").encode())
        temporary.replace(self.folder / pointer)
        sync(self.folder)

    def _retain(self) -> None:
        candidates = in_order(self.folder)
        if self.policy.best is not None and (first := best(candidates, self.policy.best)):
            self._point(BEST, first.name)
        else:
            (self.folder / BEST).unlink(missing_ok=True)
        for name, why in reasons(candidates, self.policy).items():
            if not why:
                _remove(self.folder / name)

    @contextmanager
    def _all_or_nothing(self, draft: Draft) -> Iterator[None]:
        """Removes what was written if the block fails, and says so if it was the disk that is full."""
        try:
            yield
        except Exception as error:
            free = shutil.disk_usage(self.folder).free
            shutil.rmtree(draft.folder, ignore_errors=True)
            full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
            # Ranks in other processes report a full disk in wrappings of their own; the disk itself does not lie.
            if full or os.strerror(errno.ENOSPC) in str(error) or free < FULL_BELOW:
                raise CheckpointError(
                    f"{self.folder}: the disk is full: a checkpoint needs about {draft.expected_bytes} bytes, {free} "
                    f"were free when writing failed ({error})") from error
            raise

    def _require_space(self, needed: int) -> None:
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise CheckpointError(
                f"{self.folder}: a checkpoint needs about {needed} bytes, {free} are free; free some space, point "
                "'runs' elsewhere, or lower checkpoint.keep")


def complete(folder: Path) -> list[Path]:
    """Checkpoints that have been committed, by step."""
    return sorted((p for p in folder.glob("step_*") if re.fullmatch(r"step_\d+", p.name)), key=step_of)


def in_order(folder: Path) -> list[Candidate]:
    """Committed checkpoints in the order in which they were written, the one that `latest` names last; those whose
    manifest cannot be read are left out."""
    found = []
    for path in complete(folder):
        try:
            manifest = read_manifest(path)
        except CheckpointError:
            continue
        found.append((manifest.written, Candidate(path.name, manifest.step, manifest.contents.metrics)))
    # A clock may have been set back since.
    latest = pointed(folder, LATEST)
    return [candidate for _, candidate in sorted(found, key=lambda item: (item[1].name == latest, item[0]))]


def pointed(folder: Path, pointer: str) -> str | None:
    """The name in the file `latest` or `best`; None when there is no such file."""
    try:
        return (folder / pointer).read_text().strip()
    except FileNotFoundError:
        return None


def resolve(folder: Path, name: str) -> Path:
    """The folder of a checkpoint: `step_40`, or what `latest` or `best` names. UsageError when there is none."""
    have = [path.name for path in complete(folder)]
    wanted = pointed(folder, name) if name in (LATEST, BEST) else name
    if wanted is None and name == LATEST and have:
        wanted = have[-1]
    if wanted in have:
        return folder / wanted
    if wanted is not None and wanted != name:
        raise CheckpointError(f"{folder / name} names {wanted}, which does not exist in {folder}; have {have}")
    near = min(have, key=lambda other: abs(_number(other) - _number(name))) if have and _number(name) >= 0 else None
    raise UsageError(f"{folder} has no checkpoint {name!r}; have {have}" + (f"; the nearest is {near}" if near else ""))


def step_of(path: Path) -> int:
    return _number(path.name)


def _number(name: str) -> int:
    found = re.fullmatch(r"step_(\d+)", name)
    return int(found[1]) if found else -1


def _is_good(checkpoint: Path) -> bool:
    try:
        verify(checkpoint)
    except CheckpointError:
        return False
    return True


def _remove(checkpoint: Path) -> None:
    """Under a name that is no checkpoint's, since half of one that is being removed is none."""
    doomed = checkpoint.with_name(f"{checkpoint.name}.{secrets.token_hex(4)}{PARTIAL}")
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)


def _restore(folder: Path) -> None:
    """Undo a replacement that a run died in the middle of, or end it."""
    for replaced in folder.glob(f"step_*{REPLACED}"):
        original = replaced.with_name(replaced.name.removesuffix(REPLACED))
        if original.exists():
            _remove(replaced)
        else:
            replaced.rename(original)


def _clear(folder: Path) -> None:
    """Remove what runs that died were writing, or removing. What their last ranks still write goes next time."""
    for partial in folder.glob(f"step_*{PARTIAL}"):
        shutil.rmtree(partial, ignore_errors=True)


def _lock(path: Path) -> int | None:
    """Descriptor of the locked file, None where the file system has no locks. UsageError when another run has it."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.read(handle, 200).decode(errors="replace").strip()
        os.close(handle)
        raise UsageError(f"{path.parent}: another run writes its checkpoints here ({owner}); end it first, or choose "
                         "another --name") from None
    except OSError as error:
        os.close(handle)
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            return None
        raise
    os.truncate(handle, 0)
    os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return handle

"""Runs a conversion: in parallel over processes, into a folder that appears when all of it is there and was checked.

    TARGET.partial/…            being written, or what an interrupted conversion left; the same one goes on with it
    TARGET.partial/plan.json    what conversion it is
    TARGET.partial/lock         held by whoever converts
"""

from __future__ import annotations

import errno
import fcntl
import gc
import json
import multiprocessing
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch

from megatron_pbsd.checkpointing.conversion.plan import Conversion, digests_path, require
from megatron_pbsd.checkpointing.errors import CheckpointError
from megatron_pbsd.checkpointing.files import sync
from megatron_pbsd.errors import PbsdError

PLAN, LOCK = "plan.json", "lock"
WORTH_A_PROCESS = 4 << 30
"""Bytes; starting a process, which imports torch, takes the processor about as long as converting these."""
MARGIN = 16 << 20
"""Bytes that indices and configuration may take."""
BLOCK = 512
"""Bytes, of which `stat` counts a file's: those that it really has."""
SYNCS = 8
"""At a time."""
REPORT_S = 0.2
Progress = Callable[[int, int], None]
"""(bytes done, bytes in all); every byte counts twice, when it is written and when it is checked."""


@dataclass(frozen=True)
class Done:
    """nbytes: of tensors. kept: sections of an interrupted conversion that were still good."""

    nbytes: int
    sections: int
    kept: int
    processes: int


@contextmanager
def _old_objects_kept() -> Iterator[None]:
    """Searching all that was there before, torch above all, for garbage takes longer than a small conversion."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@_old_objects_kept()
def convert(
    conversion: Conversion, target: Path, processes: int | None = None, progress: Progress = lambda done, total: None
) -> Done:
    """Write `target`. CheckpointError with everything that is wrong, in which case there is none.

    processes: at most so many; None: as many as there are cores, and few for little.
    """
    target = target.absolute()
    partial = target.with_name(target.name + ".partial")
    problems = [f"{target} exists already; remove it, or choose another target"] if target.exists() else []
    require(problems + conversion.problems())
    sections = conversion.sections()
    total = sum(sections.values())
    if processes is None:
        processes = max(1, min(os.cpu_count() or 1, total // WORTH_A_PROCESS + 1))
    processes = min(processes, len(sections))
    with _claimed(partial, conversion.identity()):
        folder = partial / conversion.inner
        folder.mkdir(exist_ok=True)
        _require_space(partial, total)
        try:
            outcomes = _all(Task(conversion, folder, sections), processes, lambda done: progress(done, 2 * total))
            if wrong := [o.problem for o in outcomes if o.problem]:
                require(conversion.damage() or wrong)
            conversion.finish(folder)
        except OSError as error:
            raise _explained(error, partial, total) from error
        (partial / PLAN).unlink()
        with ThreadPoolExecutor(SYNCS) as pool:  # the file system takes those that come together as one
            list(pool.map(sync, (*partial.rglob("*"), partial)))
        (partial / LOCK).unlink()
        partial.rename(target)
        sync(target.parent)
    return Done(total, len(sections), sum(o.kept for o in outcomes), processes)


@contextmanager
def _claimed(partial: Path, identity: dict[str, Any]) -> Iterator[None]:
    """`partial` is this process's alone, and holds nothing that another conversion left."""
    partial.mkdir(parents=True, exist_ok=True)
    with (partial / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"{partial} is being written by another process") from None
        plan = json.dumps(identity)
        if not (partial / PLAN).is_file() or (partial / PLAN).read_text() != plan:
            for path in partial.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name != LOCK:
                    path.unlink()
            (partial / PLAN).write_text(plan)
        yield


def _require_space(partial: Path, total: int) -> None:
    free = shutil.disk_usage(partial).free
    held = sum(path.stat().st_blocks * BLOCK for path in partial.rglob("*") if path.is_file())
    if free + held < total + MARGIN:
        raise CheckpointError(f"{partial}: the conversion needs {total + MARGIN - held} bytes, {free} are free; free "
                              "some space, or convert to another disk")


@dataclass(frozen=True)
class Outcome:
    """Of one section. kept: it was there already. problem: empty when all is well."""

    name: str
    kept: bool = False
    problem: str = ""


@dataclass(frozen=True)
class Task:
    """sections: name → bytes."""

    conversion: Conversion
    folder: Path
    sections: dict[str, int]

    def run(self, name: str, done: Callable[[int], None]) -> Outcome:
        """Write and check a section, unless it is there and good."""
        try:
            if self._is_good(name, done):
                done(self.sections[name])
                return Outcome(name, kept=True)
            self.conversion.discard(self.folder, name)
            self.conversion.write(self.folder, name, done)
            return Outcome(name, problem="; ".join(self.conversion.check(self.folder, name, done)))
        except PbsdError as error:
            return Outcome(name, problem=str(error))

    def _is_good(self, name: str, done: Callable[[int], None]) -> bool:
        if not digests_path(self.folder, name).exists():
            return False
        try:
            return not self.conversion.check(self.folder, name, done)
        except (PbsdError, OSError, ValueError, KeyError):  # whatever a damaged file may lead to
            return False


def _all(task: Task, processes: int, progress: Callable[[int], None]) -> list[Outcome]:
    """Of every section. This process works too, at once: others need seconds to start. OSError when the disk does not
    do its part."""
    if processes == 1:
        total = 0

        def counted(nbytes: int) -> None:
            nonlocal total
            total += nbytes
            progress(total)

        return [task.run(name, counted) for name in task.sections]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, type(task.conversion).__module__])
    counter, position = context.Value("q", 0), context.Value("q", 0)
    fresh = replace(task, conversion=replace(task.conversion))  # without the files that this process has open
    workers = {}
    for _ in range(processes - 1):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(fresh, counter, position, theirs), daemon=True)
        process.start()
        theirs.close()
        workers[ours] = process

    def done(nbytes: int) -> None:
        _add(counter, nbytes)
        progress(counter.value)

    try:
        outcomes = [task.run(name, done) for name in _taken(task, position)]
        return outcomes + _collect(list(workers), lambda: progress(counter.value))
    finally:
        for process in workers.values():
            process.kill()
            process.join()


def _collect(pipes: list[connection.Connection], report: Callable[[], None]) -> list[Outcome]:
    outcomes = []
    while pipes:
        for pipe in connection.wait(pipes, timeout=REPORT_S):
            try:
                message = pipe.recv()
            except EOFError:
                raise CheckpointError("a process of the conversion was killed, perhaps for want of memory; the same "
                                      "command goes on with what is done") from None
            if message is None:
                pipes.remove(pipe)
            elif isinstance(message, BaseException):
                raise message
            else:
                outcomes.append(message)
        report()
    return outcomes


def _work(task: Task, counter: Any, position: Any, pipe: connection.Connection) -> None:
    """What another process does. counter: bytes done by all; position: of the section that is the next to be taken."""
    torch.set_num_threads(1)
    threading.Thread(target=_follow, daemon=True).start()
    try:
        for name in _taken(task, position):
            pipe.send(task.run(name, lambda nbytes: _add(counter, nbytes)))
        pipe.send(None)
    except Exception as error:
        pipe.send(error)


def _taken(task: Task, position: Any) -> Iterator[str]:
    """One section after another, of those that no other process has taken."""
    names = list(task.sections)
    while True:
        with position.get_lock():
            at = position.value
            position.value += 1
        if at >= len(names):
            return
        yield names[at]


def _add(counter: Any, nbytes: int) -> None:
    with counter.get_lock():
        counter.value += nbytes


def _follow() -> None:
    """End when whoever started this process is gone: a successor will write the same sections."""
    connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _explained(error: OSError, partial: Path, total: int) -> Exception:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        free = shutil.disk_usage(partial).free
        return CheckpointError(
            f"{partial}: the disk is full: the conversion needs about {total} bytes, {free} are free ({error}); make "
            "room and give the same command, it goes on with what is done")
    return error

"""Checkpoints: for how long they keep the learner from training, and whether what was saved survives its writers.

stall_ratio  and what it is made of: see checkpoint_stall.py, which `overrides` are for
kill_trials  how often processes that were writing checkpoints got SIGKILL, at a random moment: a driver, which commits,
             with its ranks or without them
kill_lost    of these, after how many a checkpoint that had been reported as committed was not there any more
kill_wrong   of these, after how many something could be loaded that was not what was saved
kill_committed  checkpoints that were reported as committed, in all trials together

Trials follow each other in one folder, each going on from the newest checkpoint, or writing it once more.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from launcher.bench import checkpoint_stall
from megatron_pbsd.checkpointing.errors import CheckpointError
from megatron_pbsd.checkpointing.fsck import LEARNER, examine
from megatron_pbsd.checkpointing.manifest import Contents, read_manifest
from megatron_pbsd.checkpointing.store import CheckpointStore, complete, step_of
from megatron_pbsd.checkpointing.torch_dist import Reader, Writer, write_common, writer_name
from megatron_pbsd.config import CheckpointConfig

TRIALS, RANKS = 50, 2
TENSORS, ROWS, COLUMNS = 3, 64, 64
LATEST_S = 0.3
"""Seconds; kills come up to so long after a trial's first checkpoint begins or, in every other trial, is committed."""
POLICY = CheckpointConfig(keep=2, keep_every=5, best={"metric": "m"})
DEADLINE_S = 30.0


def run(overrides: Sequence[str] = ()) -> dict[str, Any]:
    stall = checkpoint_stall.run(overrides)
    with tempfile.TemporaryDirectory(prefix="pbsd-bench-") as folder:
        killed = kill_trials(Path(folder), TRIALS)
    return stall | {"kill_trials": killed.trials, "kill_lost": killed.lost, "kill_wrong": killed.wrong,
                    "kill_committed": killed.checkpoints}


@dataclass
class Killed:
    """checkpoints: committed in all trials together."""

    trials: int = 0
    lost: int = 0
    wrong: int = 0
    checkpoints: int = 0


def kill_trials(folder: Path, trials: int, seed: int = 0) -> Killed:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    chance, found, reported = random.Random(seed), Killed(), 0
    for trial in range(trials):
        first = max(1, reported + chance.choice([0, 1]))
        ours, theirs = context.Pipe()
        driver = context.Process(target=save_until_killed, args=(folder, first, trial, theirs))
        driver.start()
        theirs.close()
        ranks = ours.recv()
        if trial % 2:
            ours.poll(DEADLINE_S)
        time.sleep(chance.uniform(0, LATEST_S))
        _kill(driver.pid, ranks if chance.random() < 0.5 else [])
        driver.join()
        with suppress(EOFError):
            while True:
                reported = max(reported, ours.recv())
                found.checkpoints += 1
        with CheckpointStore(folder, POLICY, DEADLINE_S) as store:
            newest = _newest(store)
            found.trials += 1
            found.lost += newest < reported
            found.wrong += any(is_wrong(path) for path in complete(folder))
            reported = max(reported, newest)
    return found


def save_until_killed(folder: Path, first: int, generation: int, reports: Connection) -> None:
    """A driver: checkpoints of step after step from `first` on, written by ranks in processes of their own.

    To `reports` goes a list of the ranks, and then each step that has been committed.
    """
    ranks = [_start_rank(rank) for rank in range(RANKS)]
    with CheckpointStore(folder, POLICY, DEADLINE_S) as store:
        reports.send([pid for pid, _ in ranks])
        for step in count(first):
            contents = Contents(step, metrics={"m": float(step % 7)}, position={"generation": generation})
            with store.writing(contents, 0, [writer_name(rank) for rank in range(RANKS)]) as partial:
                # Whoever may write has had the checkpoint before committed.
                if step > first:
                    reports.send(step - 1)
                (partial / LEARNER).mkdir()
                for _, commands in ranks:
                    os.write(commands, f"{partial / LEARNER} {step} {generation}\n".encode())


def _start_rank(rank: int) -> tuple[int, int]:
    """(process, descriptor that takes its commands)."""
    reading, writing = os.pipe()
    if pid := os.fork():
        os.close(reading)
        return pid, writing
    os.close(writing)
    with suppress(FileNotFoundError), os.fdopen(reading) as commands:  # what it writes to is removed if it outlives us
        for command in commands:
            folder, step, generation = command.split()
            write_part(Path(folder), rank, int(step), int(generation))
    os._exit(0)


def write_part(folder: Path, rank: int, step: int, generation: int) -> None:
    """A rank's rows of every tensor."""
    if rank == 0:
        write_common(folder, {"step": step, "generation": generation})
    writer, each = Writer(folder, writer_name(rank)), ROWS // RANKS
    for k in range(TENSORS):
        part = saved(k, step, generation)[rank * each : (rank + 1) * each]
        writer.tensor(f"tensor.{k}", (ROWS, COLUMNS), (rank * each, 0), part)
    writer.object(f"rng/shard_{rank}_{RANKS}", step)
    writer.close()


def saved(k: int, step: int, generation: int) -> torch.Tensor:
    """What tensor `k` of the step's checkpoint holds, of one generation of writers."""
    return torch.arange(ROWS * COLUMNS).view(ROWS, COLUMNS) * 1000 + 100 * k + 7 * step + 1_000_000_000 * generation


def is_wrong(checkpoint: Path) -> bool:
    """Whether a committed checkpoint is incomplete, or holds something else than its manifest says."""
    if examine(checkpoint):
        return True
    contents, reader = read_manifest(checkpoint).contents, Reader(checkpoint / LEARNER)
    step, generation = contents.step, contents.position["generation"]
    whole = (slice(0, ROWS), slice(0, COLUMNS))
    return step != step_of(checkpoint) or reader.common() != {"step": step, "generation": generation} or not all(
        torch.equal(reader.read(f"tensor.{k}", whole), saved(k, step, generation)) for k in range(TENSORS))


def _kill(driver: int, ranks: Sequence[int]) -> None:
    for pid in (*ranks, driver):
        os.kill(pid, signal.SIGKILL)


def _newest(store: CheckpointStore) -> int:
    """Step of the newest checkpoint that can be loaded, 0 for none."""
    try:
        newest = store.newest()
    except CheckpointError:
        return 0
    return step_of(newest) if newest else 0

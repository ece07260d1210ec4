"""Conversions killed at random points: python kill_trials.py HF_FOLDER CHECKPOINT WORK TRIALS SEED PROCESSES

A child is killed by SIGKILL when it has done so many operations on files, counted by Python's audit events, and with it
the processes that it has started; then there is no target, or a good one, and the same conversion goes on with what is
left and makes a good one. Prints one line of JSON; any other outcome is an error.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
from pathlib import Path

from megatron_pbsd.checkpointing.conversion.compare import damage, differences
from megatron_pbsd.checkpointing.conversion.driver import convert
from megatron_pbsd.checkpointing.conversion.reshard import Reshard
from megatron_pbsd.checkpointing.conversion.to_hf import ToHf
from megatron_pbsd.checkpointing.conversion.to_megatron import ToMegatron

FILE_EVENTS = ("open", "os.", "shutil.", "mmap.", "fcntl.")


def child(conversion, target: Path, processes: int, kill_at: int | None) -> tuple[int, int]:
    """(signal that ended it, what it wrote to its pipe: events it made, or files it kept)."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        events = 0

        def count(event: str, _: object) -> None:
            nonlocal events
            if event.startswith(FILE_EVENTS):
                events += 1
                if events == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        done = convert(conversion, target, processes)
        os.write(writing, json.dumps([events, done.kept]).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    _, status = os.waitpid(pid, 0)
    if not os.WIFSIGNALED(status) and status:
        raise SystemExit(f"a conversion to {target} ended with status {status}")
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0, json.loads(said) if said else [0, 0]


def main(hf: Path, checkpoint: Path, work: Path, trials: int, seed: int, processes: int) -> None:
    conversions = [ToMegatron(hf, piece_bytes=4000),
                   ToHf(checkpoint, shard_bytes=40_000, section_bytes=15_000, piece_bytes=4000),
                   Reshard(checkpoint, count=4, piece_bytes=4000)]
    draw, killed, kept = random.Random(seed), 0, 0
    lengths = []
    for i, conversion in enumerate(conversions):
        lengths.append(child(conversion, work / f"whole{i}", 1, None)[1][0])
    for trial in range(trials):
        i = trial % len(conversions)
        target = work / "target"
        # In later trials the conversion that goes on is killed too.
        for _ in range(1 + trial % 2):
            ended, _ = child(conversions[i], target, processes, draw.randrange(1, lengths[i]))
            killed += ended == signal.SIGKILL
            if target.exists():
                break
        if not target.exists():
            kept += child(conversions[i], target, 1, None)[1][1]
        wrong = damage(target) + differences(target, hf)[0]
        if wrong or (work / "target.partial").exists():
            raise SystemExit(f"trial {trial}: {wrong or 'something is left'}")
        shutil.rmtree(target)
    print(json.dumps({"trials": trials, "killed": killed, "kept": kept, "events": lengths}))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]), *map(int, sys.argv[4:7]))

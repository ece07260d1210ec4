"""A pool of gloo ranks for many tests: importing Megatron-core costs seconds, once."""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
import sys
import time
import traceback
from multiprocessing.connection import Connection, wait

import torch

from megatron_pbsd.ports import free_port

PRELOAD = ["megatron_pbsd.learner.learner", "megatron_pbsd.platform.cpu_modules"]
MOST_THREADS = 20
"""A model with the distributed optimizer is in cycles that Python cannot collect, and with it are its process groups,
whose threads poll and make all else slow. Ranks that have more are started anew, which takes 0.2 s: what they import is
in the server that they are forked from."""


class RankFailure(AssertionError):
    """A rank raised, died or outlived its deadline."""


def _serve(connection: Connection, path: list[str]) -> None:
    sys.path[:] = path
    torch.set_num_threads(1)
    # What is imported by now stays: collecting the rest after each call is cheap, and ends the threads of its groups.
    gc.freeze()
    threads = 0
    while True:
        try:
            module, name, args = connection.recv()
        except EOFError:
            return
        try:
            result = (True, getattr(importlib.import_module(module), name)(*args))
        except Exception:
            result = (False, traceback.format_exc())
        connection.send((*result, threads))
        del result
        gc.collect()
        threads = len(os.listdir("/proc/self/task"))


class RankPool:
    def __init__(self, size: int):
        self.size = size
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOAD)
        self.ranks: list[tuple[multiprocessing.Process, Connection]] = []

    def run(self, function, world_size: int, *args, deadline_s: float = 90.0) -> list:
        """Results of `function(rank, rendezvous, *args)` by rank; `function` is a module's top-level function."""
        self._start()
        rendezvous = f"tcp://127.0.0.1:{free_port()}"
        for rank, (_, connection) in enumerate(self.ranks[:world_size]):
            connection.send((function.__module__, function.__name__, (rank, rendezvous, *args)))
        results: dict[int, object] = {}
        most = 0
        limit = time.monotonic() + deadline_s
        while len(results) < world_size:
            waiting = {self.ranks[r][1]: r for r in range(world_size) if r not in results}
            ready = wait(waiting, timeout=max(0.0, limit - time.monotonic()))
            if not ready:
                self._fail(f"ranks {sorted(waiting.values())} did not answer within {deadline_s:g} s")
            for connection in ready:
                rank = waiting[connection]
                try:
                    succeeded, value, threads = connection.recv()
                except EOFError:
                    self._fail(f"rank {rank} died")
                if not succeeded:
                    self._fail(f"rank {rank} raised:\n{value}")
                results[rank], most = value, max(most, threads)
        if most > MOST_THREADS:
            self.close()
        return [results[rank] for rank in range(world_size)]

    def close(self) -> None:
        for process, connection in self.ranks:
            connection.close()
            process.kill()
            process.join()
        self.ranks = []

    def _start(self) -> None:
        while len(self.ranks) < self.size:
            ours, theirs = self.context.Pipe()
            process = self.context.Process(target=_serve, args=(theirs, list(sys.path)), daemon=True)
            process.start()
            theirs.close()
            self.ranks.append((process, ours))

    def _fail(self, message: str) -> None:
        # The others may wait in a collective for the one that failed: none of them can be used again.
        self.close()
        raise RankFailure(message)

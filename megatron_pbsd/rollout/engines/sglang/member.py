"""The part of an engine's server on a further machine."""

from __future__ import annotations

import os
import threading
from multiprocessing.connection import wait

from megatron_pbsd.platform.usage import MemoryUse, of_process
from megatron_pbsd.ports import free_port
from megatron_pbsd.rollout.engines.sglang.lifeline import LastWords, Lifeline
from megatron_pbsd.rollout.engines.sglang.processes import Launch, Processes


class Member:
    """Its processes run for as long as the engine holds on to them. When they end, the engine is told why.

    number: of the machine, from 1. EngineError when the engine is not there.
    """

    def __init__(self, name: str, launch: Launch, number: int):
        self._name, self._on_cpu = name, launch.arguments.get("device") == "cpu"
        self._lifeline = Lifeline(name, launch.meeting, launch.start_s)
        order = self._lifeline.order()
        if order is None:  # The engine says itself why.
            return self._lifeline.close()
        # It answers at a port too, whether it is well; nobody asks.
        self._processes = Processes(launch, {**order, "node_rank": number, "port": free_port()})
        threading.Thread(target=self._hold, daemon=True).start()

    def _hold(self) -> None:
        ended = os.pidfd_open(self._processes.keeper.pid)
        wait([self._lifeline, ended])
        os.close(ended)
        if (status := self._processes.keeper.poll()) is not None:
            self._lifeline.say(LastWords(
                self._name, f"its processes ended with status {status}; their log is {self._processes.log}",
                self._processes.last_lines()))
        self._processes.close()
        self._lifeline.close()

    def memory(self) -> MemoryUse:
        """What the engine holds, it says for all of its parts."""
        return of_process({}) if self._on_cpu else MemoryUse({})

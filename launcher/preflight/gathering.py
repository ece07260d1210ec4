"""All probes of a node at once, each with a deadline: one that hangs, as a dead file server makes it, is a fact too."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.preflight import host
from launcher.preflight.facts import NodeFacts
from launcher.preflight.gpus import GpuProbe

Probe = Callable[[], Mapping[str, Any]]
"""Fields of `NodeFacts` by name."""


@dataclass(frozen=True)
class Subject:
    """What is looked at. rank, name: the node's. rendezvous: where the nodes meet, None for one alone. folder: the
    run's. ports: that the run needs on this node. temporary: where Ray and others put what they spill."""

    rank: int
    name: str
    hostname: str
    folder: Path
    rendezvous: tuple[str, int] | None = None
    ports: Sequence[int] = ()
    temporary: Path = Path("/tmp")


def gather(subject: Subject, gpu_probe: Callable[[], GpuProbe], deadline_s: float) -> NodeFacts:
    """Comes back after `deadline_s`, whatever hangs."""
    found, failures = answers(_probes(subject, gpu_probe), deadline_s)
    fields: dict[str, Any] = {}
    for name in _ORDER:
        for field, value in found.get(name, {}).items():
            merges = isinstance(value, dict | tuple) and isinstance(fields.get(field), type(value))
            fields[field] = _merged(fields[field], value) if merges else value
    return NodeFacts(subject.rank, subject.name, subject.hostname, failures=failures, **fields)


_ORDER = ("versions", "GPUs", "networks", "limits", "ports", "/dev/shm", "run folder", "temporary folder")


def _merged(first: Any, second: Any) -> Any:
    return first | second if isinstance(first, dict) else first + second


def _probes(subject: Subject, gpu_probe: Callable[[], GpuProbe]) -> dict[str, Probe]:
    def versions() -> dict[str, Any]:
        return {"import_s": host.import_seconds(), "versions": host.versions()}

    def gpus() -> dict[str, Any]:
        probe = gpu_probe()
        return {"gpus": tuple(probe.gpus()), "versions": probe.versions()}

    def networks() -> dict[str, Any]:
        return {"interfaces": host.interfaces(), "fabric": host.fabric_ports(), "own_address": host.own_address(),
                "route_address": host.route_address(*subject.rendezvous) if subject.rendezvous else "",
                "variables": host.network_variables()}

    def shared_memory() -> dict[str, Any]:
        total, free = host.shared_memory()
        return {"shm_bytes": total, "shm_free_bytes": free}

    return dict(zip(_ORDER, (
        versions, gpus, networks, lambda: {"limits": host.limits()},
        lambda: {"busy_ports": host.busy(subject.ports)}, shared_memory,
        lambda: {"disks": (host.disk("run", subject.folder),)},
        lambda: {"disks": (host.disk("temporary", subject.temporary),)}), strict=True))


def answers(probes: Mapping[str, Probe], deadline_s: float) -> tuple[dict[str, Mapping[str, Any]], dict[str, str]]:
    """(what each one found, what kept others from it). Those that hang are left to themselves, in daemon threads."""
    done: queue.SimpleQueue[tuple[str, Mapping[str, Any] | Exception]] = queue.SimpleQueue()

    def run(name: str, probe: Probe) -> None:
        try:
            done.put((name, probe()))
        except Exception as error:
            done.put((name, error))

    for name, probe in probes.items():
        threading.Thread(target=run, args=(name, probe), name=f"preflight {name}", daemon=True).start()
    found: dict[str, Mapping[str, Any]] = {}
    failures: dict[str, str] = {}
    end = time.monotonic() + deadline_s
    while len(found) + len(failures) < len(probes):
        try:
            name, result = done.get(timeout=max(0.0, end - time.monotonic()))
        except queue.Empty:
            break
        if isinstance(result, Exception):
            failures[name] = f"{type(result).__name__}: {result}"
        else:
            found[name] = result
    late = [name for name in probes if name not in found and name not in failures]
    return found, failures | {name: f"no answer within {deadline_s:g} s" for name in late}

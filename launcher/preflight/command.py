"""`pbsd preflight`: one node, or the nodes of a job, looked at before a run starts on them."""

from __future__ import annotations

import argparse
import json
import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from launcher.preflight import slurm
from launcher.preflight.expected import expected_of
from launcher.preflight.facts import NodeFacts, Observed
from launcher.preflight.findings import Expected
from launcher.preflight.gathering import Subject, gather
from launcher.preflight.gpus import GpuProbe, probe_of_this_machine
from launcher.preflight.report import as_json, as_text, errors, exclude
from launcher.preflight.rules import diagnose, to_exclude
from launcher.preflight.watchdog import Watchdog
from megatron_pbsd.config import RunConfig
from megatron_pbsd.errors import PbsdError, UsageError

PROBES_S = 60.0
"""How long a node is given to look at itself: importing torch from a file server takes most of it."""
SPARE_S = 15.0
"""What a step may take beside deadlines and probes before the process counts as stuck."""
REPORT = "preflight.json"


@dataclass(frozen=True)
class Nodes:
    """Where this process stands. rendezvous: where node 0 listens, None when it is alone. names: of all nodes, if they
    are known. shared: folder that all nodes see."""

    rank: int
    size: int
    rendezvous: tuple[str, int] | None = None
    names: tuple[str, ...] = ()
    shared: Path | None = None


def run(arguments: argparse.Namespace) -> int:
    """The exit code, the same at all nodes: 1 when there are errors. Node 0 prints."""
    began = time.monotonic()
    config = _config(arguments.config)
    nodes = nodes_of(arguments, config, os.environ)
    facts = facts_of(nodes, config, probe_of_this_machine)
    expected = expected_of(config) if config else Expected()  # a model that cannot be read ends this before others wait
    observed = observe(facts, nodes, arguments.deadline)
    findings = diagnose(observed, expected)
    if nodes.rank == 0:
        excluded = to_exclude(observed, findings)
        seconds = time.monotonic() - began
        found = json.dumps(as_json(observed, findings, excluded, seconds))
        print(found if arguments.json else as_text(observed, findings, excluded, seconds), flush=True)
        _keep(found, nodes.shared, excluded, arguments.exclude_file)
    return 1 if errors(findings) else 0


def _keep(report: str, shared: Path | None, excluded: list[str], exclude_file: str | None) -> None:
    """PbsdError names the file that cannot be written."""
    try:
        if exclude_file and excluded:
            exclude(Path(exclude_file), excluded)
        if shared:
            shared.mkdir(parents=True, exist_ok=True)
            (shared / REPORT).write_text(report, encoding="utf-8")
    except OSError as error:
        raise PbsdError(f"what the preflight found could not be kept: {error}") from error


def nodes_of(arguments: argparse.Namespace, config: RunConfig | None, environment: Mapping[str, str]) -> Nodes:
    """From options, or else from Slurm's variables. UsageError lists everything that is missing."""
    given = {"--nodes": arguments.nodes, "--node-rank": arguments.node_rank, "--rendezvous": arguments.rendezvous}
    folder = arguments.shared or (config and config.folder)
    if all(value is None for value in given.values()):
        step = slurm.step(environment)
        if step is None:
            return Nodes(0, 1, shared=Path(arguments.shared) if arguments.shared else None)
        rank, names = step
        if folder is None:
            raise UsageError("nodes need a folder that they share: give CONFIG, or --shared FOLDER")
        return Nodes(rank, len(names), (names[0], slurm.rendezvous_port(environment)), names, Path(folder))
    missing = [name for name, value in (*given.items(), ("--shared or CONFIG", folder)) if value is None]
    if missing:
        raise UsageError(f"several nodes need {', '.join(given)} and a shared folder; missing: {', '.join(missing)}")
    host, _, port = arguments.rendezvous.rpartition(":")
    problems = []
    if arguments.nodes < 1 or not 0 <= arguments.node_rank < arguments.nodes:
        problems.append(f"--node-rank = {arguments.node_rank}, --nodes = {arguments.nodes}: expected 0 ≤ rank < nodes")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        problems.append(f"--rendezvous = {arguments.rendezvous!r}: expected HOST:PORT, such as node1:29500")
    if problems:
        raise UsageError("\n".join(problems))
    return Nodes(arguments.node_rank, arguments.nodes, (host, int(port)), shared=Path(folder))


def observe(facts: NodeFacts, nodes: Nodes, deadline_s: float) -> Observed:
    """This node and, with others, if there are any, what is between them."""
    if nodes.rendezvous is None or nodes.size == 1:
        return Observed((facts,))
    # torch comes with these, and how long its import takes is one of the facts.
    from launcher.preflight.check import together
    from launcher.preflight.meeting import Place

    place = Place(nodes.rank, nodes.size, *nodes.rendezvous, nodes.names, deadline_s)
    watchdog = Watchdog(f"node {nodes.rank} ({facts.name})", 4 * deadline_s + PROBES_S + SPARE_S)
    try:
        return together(facts, place, nodes.shared, time.time, watchdog.enter, PROBES_S)
    finally:
        watchdog.close()


def facts_of(nodes: Nodes, config: RunConfig | None, probe: Callable[[], GpuProbe]) -> NodeFacts:
    """What this machine is like."""
    hostname = socket.gethostname()
    folder = nodes.shared or (config.folder if config else Path.cwd())
    ports = (config.ray_port,) if config and config.ray_port and nodes.rank == 0 else ()
    subject = Subject(nodes.rank, os.environ.get("SLURMD_NODENAME", hostname), hostname, folder, nodes.rendezvous,
                      ports, Path(os.environ.get("TMPDIR", "/tmp")))
    return gather(subject, probe, PROBES_S)


def _config(path: str | None) -> RunConfig | None:
    if path is None:
        return None
    from launcher.overrides import load_config

    return load_config(path, check_model=False)

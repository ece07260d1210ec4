"""What the preflight found: one table, problems first; or JSON; and the list of nodes to leave out."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from launcher.preflight.facts import NodeFacts, Observed, to_json
from launcher.preflight.findings import Finding, size
from launcher.preflight.networks import choose
from launcher.preflight.tournament import rounds, speeds


def as_json(observed: Observed, findings: Sequence[Finding], excluded: Sequence[str], seconds: float) -> dict[str, Any]:
    """Everything, with nodes by name in findings."""
    network, interfaces = choose(observed.nodes).network, choose(observed.nodes).interfaces
    return {
        "ok": not errors(findings), "errors": len(errors(findings)), "warnings": len(findings) - len(errors(findings)),
        "findings": [{"node": None if one.rank is None else observed.name(one.rank), **asdict(one)}
                     for one in findings],
        "exclude": list(excluded), "seconds": round(seconds, 1),
        "network": {"subnet": network and str(network),
                    "interfaces": {observed.name(rank): one.name for rank, one in interfaces.items()}},
        "observed": json.loads(to_json(observed))}


def errors(findings: Sequence[Finding]) -> list[Finding]:
    return [one for one in findings if one.severity == "error"]


def as_text(observed: Observed, findings: Sequence[Finding], excluded: Sequence[str], seconds: float) -> str:
    lines = [*_problems(observed, findings), *_nodes(observed), "", *_between(observed)]
    if excluded:
        lines.append(f"to be left out: {', '.join(excluded)}")
    failed = len(errors(findings))
    lines.append(f"{_count(failed, 'error')}, {_count(len(findings) - failed, 'warning')} on "
                 f"{_count(observed.expected_nodes, 'node')}, in {seconds:.0f} s")
    return "\n".join(lines)


def _problems(observed: Observed, findings: Sequence[Finding]) -> list[str]:
    """What several nodes have in common is said once."""
    by_problem: dict[Finding, list[Finding]] = {}
    for one in findings:
        by_problem.setdefault(replace(one, rank=None, measured="", blames_node=False), []).append(one)
    if not by_problem:
        return []
    rows = [("", "node", "check", "what", "measured", "expected")]
    for problem, found in by_problem.items():
        names = [observed.name(one.rank) for one in found if one.rank is not None]
        measured = dict.fromkeys(one.measured for one in found)
        rows.append((problem.severity.upper(), _few(names) or "all", problem.check, problem.what, _few([*measured]),
                     problem.expected))
    table, indent = _aligned(rows), " " * len("WARNING  ")
    lines = [table[0]]
    for row, problem in zip(table[1:], by_problem, strict=True):
        lines += [row, f"{indent}→ {problem.remedy}"]
    return [*lines, ""]


def _nodes(observed: Observed) -> list[str]:
    found, clocks = speeds(observed.pairs), {clock.rank: clock.offset_s for clock in observed.clocks}
    interfaces = choose(observed.nodes).interfaces
    rows = [("node", "address", "GPUs", "driver", "torch", "/dev/shm", "run folder", "clock", "GB/s")]
    for node in observed.nodes:
        interface = interfaces.get(node.rank)
        disk = next((disk for disk in node.disks if disk.purpose == "run"), None)
        rows.append((
            observed.name(node.rank), f"{interface.name} {interface.address}" if interface else "none", _gpus(node),
            node.versions.get("driver", "-"), node.versions.get("torch", "-"),
            "-" if node.shm_bytes is None else size(node.shm_bytes),
            f"{size(disk.free_bytes)} free, {disk.write_mb_s:.0f} MB/s" if disk and disk.write_mb_s else "-",
            f"{clocks[node.rank]:+.3f} s" if node.rank in clocks else "-",
            f"{found[node.rank]:.3g}" if node.rank in found else "-"))
    return _aligned(rows)


def _between(observed: Observed) -> list[str]:
    lines = []
    network, interfaces = choose(observed.nodes).network, choose(observed.nodes).interfaces
    if network is not None and len(observed.nodes) > 1:
        names = sorted({one.name for one in interfaces.values()})
        lines.append(f"network {network}: NCCL_SOCKET_IFNAME={','.join(names)} GLOO_SOCKET_IFNAME={','.join(names)}")
    if measured := [pair.gb_s for pair in observed.pairs if pair.gb_s is not None]:
        possible = sum(map(len, rounds([node.rank for node in observed.nodes])))
        reduced = [one.gb_s for one in observed.all_reduce if one.gb_s is not None]
        lines.append(f"{observed.backend}: {len(measured)} of {possible} pairs measured, {min(measured):.3g} to "
                     f"{max(measured):.3g} GB/s" + (f"; all nodes together {min(reduced):.3g} GB/s" if reduced else ""))
    return lines


def exclude(path: Path, names: Sequence[str]) -> None:
    """Add nodes to a file of one name a line, as a whole or not at all."""
    known = path.read_text(encoding="utf-8").split() if path.is_file() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text("".join(f"{name}\n" for name in dict.fromkeys([*known, *names])), encoding="utf-8")
    partial.replace(path)


def _gpus(node: NodeFacts) -> str:
    kinds = sorted({gpu.name for gpu in node.gpus})
    return f"{len(node.gpus)} {', '.join(kinds)}" if kinds else "none"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _count(number: int, of: str) -> str:
    return f"{number} {of}" if number == 1 else f"{number} {of}s"

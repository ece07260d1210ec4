"""`pbsd memory`: what a run will hold in memory, by phase and owner, before anything is started."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launcher.overrides import load_config
from megatron_pbsd.memory_account import UNPREDICTED, Account, predict, rows
from megatron_pbsd.platform import Platform


def account_of(path: str | Path, overrides: Sequence[str], device: str | None) -> Account:
    """device: 'cpu' or 'cuda'; None for this machine's."""
    return predict(load_config(path, overrides), _platform(device))


def _platform(device: str | None) -> Platform:
    from megatron_pbsd.platform import select
    from megatron_pbsd.platform.cpu import Cpu
    from megatron_pbsd.platform.cuda import Cuda

    return select() if device is None else {"cpu": Cpu, "cuda": Cuda}[device]()


def as_json(account: Account) -> dict[str, Any]:
    return {
        "owners": [asdict(owner) for owner in account.owners],
        "phases": {name: {"held": dict(phase.held), "waiting": dict(phase.waiting), "device_bytes": phase.device,
                          "total_bytes": phase.total + account.shared} for name, phase in account.phases.items()},
        "shared_bytes": account.shared, "at_most": dict(account.at_most), "unknown": dict(account.unknown),
        "unpredicted": list(UNPREDICTED)}


def print_account(account: Account) -> None:
    """GB of all processes by owner and phase."""
    phases = list(account.phases)
    table = [("GB of all processes", *phases)]
    table += [(name, *(_gb(bytes_by_phase[phase]) for phase in phases)) for name, bytes_by_phase in rows(account)]
    table.append(("on devices", *(_gb(account.phases[phase].device) for phase in phases)))
    table.append(("with host memory", *(_gb(account.phases[phase].total + account.shared) for phase in phases)))
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    for first, *others in table:
        print("  ".join((first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:])))))
    print("\nthe largest process: " + "; ".join(
        f"{owner.name} {_gb(owner.largest)} GB, of {owner.processes}" for owner in account.owners))
    for owner, nbytes in account.at_most.items():
        print(f"further, where it is needed: {owner}, at most {_gb(nbytes)} GB")
    for owner, reason in account.unknown.items():
        print(f"not predicted: {owner}: {reason}")
    print(f"not predicted: {'; '.join(UNPREDICTED)}")


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:,.3f}"

"""`pbsd checkpoint`: which checkpoints a run has and why, and whether they are what was written."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

from megatron_pbsd.checkpointing import recovery
from megatron_pbsd.checkpointing.errors import CheckpointError
from megatron_pbsd.checkpointing.fsck import examine
from megatron_pbsd.checkpointing.manifest import MANIFEST, files_in, read_manifest
from megatron_pbsd.checkpointing.retention import reasons
from megatron_pbsd.checkpointing.store import BEST, LATEST, PARTIAL, complete, in_order, pointed
from megatron_pbsd.config import CheckpointConfig
from megatron_pbsd.errors import UsageError
from megatron_pbsd.observability.records import CONFIG


@dataclass(frozen=True)
class Listed:
    """state: complete, partial (being written, or left by a run that died), damaged, or weights (recovered from the
    engines, to go on from with the newest checkpoint's optimizer state). bytes: on disk. age_s: since it was written.
    kept: the reasons for which it stays, by the run's configuration."""

    name: str
    step: int | None
    bytes: int
    age_s: float
    state: str
    kept: tuple[str, ...]


def checkpoints_of(path: str | Path) -> Path:
    """The folder of checkpoints that `path` is, or has. UsageError when it is neither."""
    folder = Path(path)
    for candidate in (folder / "checkpoints", folder):
        if candidate.is_dir() and (complete(candidate) or list(candidate.glob(f"step_*{PARTIAL}"))
                                   or (candidate / recovery.RECOVERED).is_dir()):
            return candidate
    raise UsageError(f"{folder} " + ("has no checkpoints" if folder.is_dir() else "does not exist")
                     + ": expected a run's folder, or one with step_… in it")


def listed(folder: Path) -> list[Listed]:
    """All checkpoints of a folder by step, then weights that were recovered, and checkpoints in the making."""
    why = _reasons(folder)
    found = [_listed(path, "complete", tuple(why.get(path.name, ()))) for path in complete(folder)]
    if (recovered := folder / recovery.RECOVERED).is_dir():
        found.append(_listed(recovered, "weights", ("newer",)))
    for path in sorted(folder.glob(f"step_*{PARTIAL}")):
        found.append(Listed(path.name, None, _size(path), _age(path.stat().st_mtime), "partial", ()))
    return found


def _listed(path: Path, state: str, kept: tuple[str, ...]) -> Listed:
    try:
        manifest = read_manifest(path)
    except CheckpointError:
        return Listed(path.name, None, _size(path), _age(path.stat().st_mtime), "damaged", ())
    return Listed(path.name, manifest.step, manifest.nbytes, _age(manifest.written), state, kept)


def print_list(found: Sequence[Listed], as_json: bool) -> None:
    if as_json:
        print(json.dumps([asdict(one) for one in found]))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("checkpoint", "step", "bytes", "age", "state", "kept", box=None, header_style="dim")
    for one in found:
        table.add_row(one.name, "–" if one.step is None else str(one.step), f"{one.bytes:,}", _duration(one.age_s),
                      one.state, ", ".join(one.kept) or "–")
    Console().print(table)


def verified(path: str | Path) -> dict[str, list[str]]:
    """Checkpoint, or recovered weights → what is wrong with it. `path`: one of them, or what `checkpoints_of` knows."""
    folder = Path(path)
    if (folder / MANIFEST).exists() or folder in complete(folder.parent):
        chosen = [folder]
    else:
        checkpoints = checkpoints_of(folder)
        chosen = complete(checkpoints) + [p for p in [checkpoints / recovery.RECOVERED] if p.is_dir()]
    return {str(one): recovery.problems(one) if one.name == recovery.RECOVERED else examine(one) for one in chosen}


def print_verified(results: dict[str, list[str]], as_json: bool) -> None:
    if as_json:
        print(json.dumps([{"checkpoint": name, "problems": problems} for name, problems in results.items()]))
        return
    for name, problems in results.items():
        print(f"{name}: " + ("good" if not problems else "damaged"))
        for problem in problems:
            print(f"  {problem}")


def _reasons(folder: Path) -> dict[str, list[str]]:
    """Name → why a checkpoint stays: by the configuration of the run around it, or the pointers that there are."""
    config = folder.parent / CONFIG
    if config.is_file():
        section = yaml.safe_load(config.read_text(encoding="utf-8"))["checkpoint"]
        return reasons(in_order(folder), CheckpointConfig.model_validate(section))
    why: dict[str, list[str]] = {}
    for pointer, reason in ((LATEST, "newest"), (BEST, "best")):
        if name := pointed(folder, pointer):
            why.setdefault(name, []).append(reason)
    return why


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in files_in(folder))


def _age(written: float) -> float:
    return round(time.time() - written, 1)


def _duration(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"

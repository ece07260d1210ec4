"""`pbsd convert`: models between Hugging Face folders and Megatron's checkpoints, and a look into both."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from math import lcm
from pathlib import Path
from typing import Any

from megatron_pbsd.errors import UsageError

DTYPES = ("float32", "bfloat16", "float16")
LAYOUT = ("tp", "pp", "vpp", "ep", "etp")
REPORT_S = 5.0
ROWS = 60
"""Of tensors in a table."""


def hf_to_megatron(arguments: argparse.Namespace) -> None:
    from megatron_pbsd.checkpointing.conversion.to_megatron import ToMegatron

    _convert(arguments, ToMegatron(
        arguments.source, arguments.dtype, _layout(arguments), piece_bytes=_piece_bytes(arguments)))


def megatron_to_hf(arguments: argparse.Namespace) -> None:
    from megatron_pbsd.checkpointing.conversion.to_hf import ToHf

    _convert(arguments, ToHf(arguments.source, arguments.config, arguments.dtype, int(arguments.shard_gb * 1e9),
                             _piece_bytes(arguments)))


def reshard(arguments: argparse.Namespace) -> None:
    from megatron_pbsd.checkpointing.conversion.reshard import Reshard

    layout = _layout(arguments)
    if (layout is None) == (arguments.files is None):
        raise UsageError("say what the files are to be: one for each rank of a layout (--tp, --pp, --vpp, --ep, "
                         "--etp), or --files N")
    _convert(arguments, Reshard(arguments.source, layout, arguments.files or 1, arguments.config,
                                _piece_bytes(arguments)))


def inspect(arguments: argparse.Namespace) -> None:
    from megatron_pbsd.checkpointing.conversion.inspect import inspect as look

    summary = look(arguments.source, arguments.config)
    if arguments.json:
        print(json.dumps(asdict(summary) | {"elements": summary.elements}))
        return
    import sys

    from rich.console import Console
    from rich.table import Column, Table

    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(f"{summary.folder}: {summary.kind}, {summary.model_type or 'model not known'}", highlight=False)
    facts = {"step": summary.step, "layout": summary.layout, "elements": f"{summary.elements:,}",
             "bytes": f"{sum(t.nbytes for t in summary.tensors):,}", "objects": summary.objects or None}
    console.print("  ".join(f"{name} {value}" for name, value in facts.items() if value is not None), highlight=False)
    table = Table(Column("tensor", overflow="fold"), "dtype", "shape", "bytes", "parts", "files")
    for tensor in summary.tensors if arguments.all else summary.tensors[:ROWS]:
        more = f" … {len(tensor.files)}" if len(tensor.files) > 1 else ""
        table.add_row(tensor.name, tensor.dtype, str(list(tensor.shape)), f"{tensor.nbytes:,}", str(tensor.parts),
                      tensor.files[0] + more)
    console.print(table)
    if not arguments.all and len(summary.tensors) > ROWS:
        console.print(f"and {len(summary.tensors) - ROWS} more: --all, or --json", highlight=False)
    for name, nbytes in summary.files.items():
        console.print(f"{name}  {nbytes:,}", highlight=False)


def verify(arguments: argparse.Namespace) -> int:
    """1 when something is wrong or differs."""
    from megatron_pbsd.checkpointing.conversion.compare import damage, differences

    with Report("verified") as report:
        if arguments.other is None:
            found, words = damage(arguments.source, arguments.config, report.progress), "is what was written"
        else:
            found, count = differences(arguments.source, arguments.other, arguments.config, report.progress)
            words = f"and {arguments.other}: {count} tensors, bit-identical"
    for problem in found:
        print(problem)
    if not found:
        print(f"{arguments.source} {words}")
    return 1 if found else 0


def add_commands(add: Callable[..., argparse.ArgumentParser], parent: Any) -> None:
    """The actions of `pbsd convert`."""
    importing = add(parent, "hf-to-megatron", "Hugging Face folder → checkpoint for Megatron-core", hf_to_megatron)
    exporting = add(parent, "megatron-to-hf", "checkpoint → Hugging Face folder", megatron_to_hf)
    resharding = add(parent, "reshard", "checkpoint → one file per rank of a layout, or N files", reshard)
    for action in (importing, exporting, resharding):
        action.add_argument("source", metavar="SOURCE", type=Path)
        action.add_argument("target", metavar="TARGET", type=Path, help="must not exist; appears when all is done")
        action.add_argument("--processes", type=_positive, help="at most so many (default: by cores and size)")
        action.add_argument("--memory-gb", type=float, default=1.0,
                            help="for buffers of all processes together (default: 1)")
    for action in (importing, exporting):
        action.add_argument("--dtype", choices=DTYPES, metavar="DTYPE", help="cast to float32, bfloat16 or float16 "
                            "(default: as stored)")
    for action in (importing, resharding):
        for name in LAYOUT:
            action.add_argument(f"--{name}", type=_positive, help=f"{name} of the layout to train in")
    exporting.add_argument("--shard-gb", type=float, default=4.0, help="largest file (default: 4)")
    resharding.add_argument("--files", type=_positive, help="so many files of about the same size")
    looking = add(parent, "inspect", "what is in a folder", inspect)
    checking = add(parent, "verify", "whether a folder is what was written, or two hold the same", verify)
    for action in (looking, checking):
        action.add_argument("source", metavar="FOLDER", type=Path)
    for action in (exporting, resharding, looking, checking):
        action.add_argument("--config", type=Path, metavar="FOLDER", help="Hugging Face folder with the model's "
                            "config.json (default: what the checkpoint keeps)")
    looking.add_argument("--json", action="store_true", help="print one line")
    looking.add_argument("--all", action="store_true", help="all tensors")
    checking.add_argument("other", metavar="OTHER", type=Path, nargs="?", help="compare with this one, bit by bit")


class Report:
    """Progress on stderr: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, verb: str):
        from rich.console import Console

        self._verb, self._console = verb, Console(stderr=True)
        self._bar, self._task, self._last = None, None, time.monotonic()
        self.started = time.monotonic()

    def __enter__(self) -> Report:
        if self._console.is_terminal:
            from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

            self._bar = Progress(BarColumn(), DownloadColumn(), TransferSpeedColumn(), "ETA", TimeRemainingColumn(),
                                 console=self._console, transient=True)
            self._task = self._bar.add_task(self._verb)
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def progress(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total)
        elif now - self._last >= REPORT_S and done:
            self._last, seconds = now, now - self.started
            self._console.print(
                f"{self._verb} {done / total:.0%} of {total / 1e9:.2f} GB  {done / seconds / 1e9:.2f} GB/s  "
                f"ETA {seconds * (total - done) / done:.0f} s", highlight=False, soft_wrap=True)


def _convert(arguments: argparse.Namespace, conversion: Any) -> None:
    from megatron_pbsd.checkpointing.conversion.driver import convert

    with Report("written and checked") as report:
        done = convert(conversion, arguments.target, arguments.processes, report.progress)
    seconds = time.monotonic() - report.started
    kept = f", {done.kept} of them from before" if done.kept else ""
    print(f"{arguments.target}: {done.nbytes / 1e9:.2f} GB in {done.sections} sections{kept}, checked; "
          f"{seconds:.1f} s, {done.processes} processes")


def _layout(arguments: argparse.Namespace) -> Any:
    """The smallest layout with these sizes; None where none is given."""
    given = {name: getattr(arguments, name) for name in LAYOUT if getattr(arguments, name) is not None}
    if not given:
        return None
    from pydantic import ValidationError

    from megatron_pbsd.config import ParallelConfig

    sizes = dict.fromkeys(LAYOUT, 1) | given
    world = sizes["pp"] * lcm(sizes["tp"], sizes["ep"] * sizes["etp"])
    try:
        return ParallelConfig(world_size=world, **sizes)
    except ValidationError as error:
        raise UsageError("; ".join(str(e["msg"]).removeprefix("Value error, ") for e in error.errors())) from error


def _piece_bytes(arguments: argparse.Namespace) -> int:
    """Each process holds the piece that it puts together, the pages it reads, and those it compares with."""
    import os

    processes = arguments.processes or os.cpu_count() or 1
    if arguments.memory_gb <= 0:
        raise UsageError(f"--memory-gb = {arguments.memory_gb:g} is not positive")
    return max(1, int(arguments.memory_gb * 1e9) // (4 * processes))


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not positive")
    return number


def command_line(name: str, argv: Sequence[str] | None = None) -> int:
    """`pbsd convert NAME …`, for the scripts in tools/."""
    import sys

    from launcher.cli import main

    return main(["convert", name, *(sys.argv[1:] if argv is None else argv)])

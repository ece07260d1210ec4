"""`pbsd node`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from contextlib import suppress

DEADLINE_S = 300.0


def add_command(command: Callable, parent: argparse._SubParsersAction) -> None:
    node = command(parent, "node", "one machine's part of a run on many: to be started once on each", _node,
                   epilog="In a Slurm step nothing else has to be said: srun --ntasks-per-node=1 pbsd node RUN")
    node.add_argument("folder", metavar="RUN", help="the run's folder, with its config.yaml, on a shared file system")
    node.add_argument("--nodes", type=int, help="how many machines there are (default: as Slurm says, or 1)")
    node.add_argument("--node-rank", type=int, help="which of them this one is, from 0, which trains")
    node.add_argument("--head", metavar="HOST", help="name or address of the first one (default: its host name)")
    node.add_argument("--deadline", type=float, default=DEADLINE_S, metavar="SECONDS",
                      help=f"for all machines to come (default: {DEADLINE_S:g})")


def _node(arguments: argparse.Namespace) -> int:
    import yaml

    from launcher.node.command import run_node
    from launcher.node.member import member_of
    from launcher.slurm.commands import hostnames
    from megatron_pbsd.errors import PbsdError
    from megatron_pbsd.observability.records import CONFIG, run_folder

    def names(listed: str) -> tuple[str, ...]:
        """Those in Slurm's list; none where, as in a container, there is nobody to ask."""
        with suppress(PbsdError):
            return hostnames(listed)
        return ()

    member = member_of(os.environ, arguments.nodes, arguments.node_rank, arguments.head, names)
    written = yaml.safe_load((run_folder(arguments.folder) / CONFIG).read_text(encoding="utf-8"))
    gpus = written.get("cluster", {}).get("gpus_per_node", 0)
    return run_node(arguments.folder, member, gpus, arguments.deadline)

"""The options of `pbsd preflight`."""

from __future__ import annotations

import argparse


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("config", nargs="?", metavar="CONFIG", help="YAML file: what is needed follows from it")
    command.add_argument("--json", action="store_true", help="print one line")
    command.add_argument("--exclude-file", metavar="FILE", help="add the names of bad nodes to this file")
    command.add_argument("--nodes", type=int, metavar="N", help="how many nodes take part (in Slurm: the step's)")
    command.add_argument("--node-rank", type=int, metavar="R", help="which of them this is, from 0")
    command.add_argument("--rendezvous", metavar="HOST:PORT", help="node 0's address, and a free port there")
    command.add_argument("--shared", metavar="FOLDER", help="a folder that all nodes see (default: CONFIG's run)")
    command.add_argument("--deadline", type=float, default=60.0, metavar="SECONDS",
                         help="for each thing that is waited for (default: 60)")

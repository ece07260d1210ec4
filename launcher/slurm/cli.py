"""`pbsd submit`, `status`, `logs`, `attach`, `cancel`, and `attempt`, which job scripts call."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable
from pathlib import Path

FAILED = 1
ANOTHER, ENDS = 0, 1
"""Exit codes of `pbsd attempt end`: the same allocation makes another attempt; the job ends."""


def add_commands(command: Callable, parent: argparse._SubParsersAction) -> None:
    submit = command(parent, "submit", "submit a run to Slurm", _submit,
                     epilog="Any key can be set on top, e.g. --cluster.slurm.partition main.")
    submit.add_argument("config", metavar="CONFIG", help="YAML file")
    submit.add_argument("--dry-run", action="store_true", help="print the job script, and do nothing")
    submit.add_argument("--seeds", default="", metavar="LIST",
                        help="one run for each seed, as an array of jobs: 1-4, or 1-8%%2 for two at once")
    submit.add_argument("--resume", nargs="?", const="latest", help="continue a run that was stopped")
    submit.add_argument("--wait", action="store_true", help="wait for the run's end, as `pbsd status --wait`")

    status = command(parent, "status", "how a submitted run is, attempt by attempt", _status)
    _add_run(status)
    status.add_argument("--json", action="store_true", help="print one line")
    status.add_argument("--wait", action="store_true",
                        help="wait until it has ended; attempts that were requeued begin at once")

    logs = command(parent, "logs", "what the attempts at a run printed", _logs)
    _add_run(logs)
    logs.add_argument("--attempt", type=int, help="which (default: the newest)")
    logs.add_argument("--follow", action="store_true", help="go on until the job has ended")

    attach = command(parent, "attach", "an interactive shell on a node of a run", _attach)
    _add_run(attach)
    attach.add_argument("--node", help="which (default: the first)")

    _add_run(command(parent, "cancel", "end a submitted run", _cancel))

    attempt = parent.add_parser("attempt", help="what job scripts call between attempts", allow_abbrev=False)
    actions = attempt.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, summary, run in (("begin", "record a new attempt, and print its number", _begin),
                               ("stop", "ask the run to end after its step", _stop)):
        _add_run(command(actions, name, summary, run))
    end = command(actions, "end", "record how the attempt ended; exit code 0 when another one follows here", _end)
    _add_run(end)
    end.add_argument("--exit-code", type=int, required=True)


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="RUN", type=Path, help="the run's folder")


def _submit(arguments: argparse.Namespace) -> int | None:
    from launcher.slurm.submit import script_of, seeds_of, submit

    if arguments.dry_run:
        from launcher.overrides import load_config

        if arguments.seeds:
            seeds_of(arguments.seeds)
        print(script_of(load_config(arguments.config, arguments.overrides), arguments.seeds), end="")
        return None
    job, folders = submit(arguments.config, arguments.overrides, arguments.seeds, bool(arguments.resume))
    print(f"job {job}: {', '.join(map(str, folders))}")
    print(f"follow it with: pbsd status {folders[0]}; pbsd logs {folders[0]} --follow", file=sys.stderr)
    return max(_wait(folder) for folder in folders) if arguments.wait else None


def _wait(folder: Path) -> int:
    from launcher.slurm.status import print_status, wait

    status = wait(folder)
    print_status(status)
    return 0 if status.state == "complete" else FAILED


def _status(arguments: argparse.Namespace) -> int | None:
    from launcher.slurm.status import print_status, status_of, wait

    status = (wait if arguments.wait else status_of)(arguments.folder)
    if arguments.json:
        print(status.to_json())
    else:
        print_status(status)
    return FAILED if arguments.wait and status.state != "complete" else None


def _logs(arguments: argparse.Namespace) -> None:
    from launcher.slurm.following import print_logs

    print_logs(arguments.folder, arguments.attempt, arguments.follow)


def _attach(arguments: argparse.Namespace) -> None:
    from launcher.slurm import commands
    from launcher.slurm.records import read_job
    from megatron_pbsd.errors import UsageError, did_you_mean

    number = read_job(arguments.folder)["job"]
    job = commands.job(number)
    if job.get("JobState") != "RUNNING":
        raise UsageError(f"job {number} does not run: `pbsd status {arguments.folder}` says why")
    nodes = commands.hostnames(job["NodeList"])
    if arguments.node and arguments.node not in nodes:
        raise UsageError(f"--node {arguments.node} is not of job {number}, which has {', '.join(nodes)}"
                         + did_you_mean(arguments.node, nodes))
    commands.shell(number, arguments.node or nodes[0])


def _cancel(arguments: argparse.Namespace) -> None:
    from launcher.slurm.job import cancel
    from megatron_pbsd.observability.records import run_folder

    number = cancel(run_folder(arguments.folder))
    print(f"cancelled job {number}; continue it with: pbsd submit CONFIG --resume")


def _begin(arguments: argparse.Namespace) -> int | None:
    from launcher.slurm.job import begin

    number, verdict = begin(arguments.folder, _slurm_of(arguments.folder))
    if verdict is None:
        print(number)
        return None
    _say(f"no attempt {number}: {verdict.reason}")
    return 0 if verdict.action == "done" else FAILED


def _stop(arguments: argparse.Namespace) -> None:
    from launcher.slurm.job import stop

    _say(f"asked the run to end after its step: {stop(arguments.folder, _slurm_of(arguments.folder))}")


def _end(arguments: argparse.Namespace) -> int:
    from launcher.slurm.job import end

    # As soon as a job is requeued Slurm tells all of its processes to end, and kills them later. What is left to do is
    # done first: until this process has ended the job does not start anew.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    verdict = end(arguments.folder, _slurm_of(arguments.folder), arguments.exit_code)
    follows = {"done": "", "again": "; another attempt follows", "requeue": "; requeued", "stop": "; given up"}
    _say(f"{verdict.reason}{follows[verdict.action]}")
    return ANOTHER if verdict.action == "again" else ENDS


def _slurm_of(folder: Path):
    import yaml

    from megatron_pbsd.config import ClusterConfig
    from megatron_pbsd.observability.records import CONFIG, run_folder

    written = yaml.safe_load((run_folder(folder) / CONFIG).read_text(encoding="utf-8"))
    return ClusterConfig.model_validate(written["cluster"]).slurm


def _say(text: str) -> None:
    print(f"pbsd: {text}", file=sys.stderr)

"""`pbsd`: train, submit, look at configurations, trajectories, reports and checkpoints, convert models, run benches.

Only what a command needs is imported, so that `pbsd config check` answers at once. Exit codes: 0 done, 1 the run
failed, 2 what was asked for is wrong, 75 asked to stop and can be resumed, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Sequence

from launcher.convert import add_commands
from launcher.node.cli import add_command as add_node_command
from launcher.preflight.arguments import add_arguments as add_preflight_arguments
from launcher.slurm.cli import add_commands as add_slurm_commands
from megatron_pbsd.errors import PbsdError, UsageError, did_you_mean

VALUED = {"simulate": ("--html",), "memory": ("--device",), "submit": ("--seeds",), "train": ("--ray-address",),
          "plan": ("--gpus", "--gpu", "--gpus-per-node", "--mean-tokens", "--runners-up")}
"""Options with a value, of commands that take overrides."""
FLAGS = ("--resume", "--json", "--help", "--dry-run", "--wait")
DONE, FAILED, WRONG, STOPPED, INTERRUPTED, TERMINATED = 0, 1, 2, 75, 130, 143


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    command_line, overrides = split_overrides(sys.argv[1:] if argv is None else argv)
    arguments = parser().parse_args(command_line)
    arguments.overrides = overrides
    try:
        return arguments.run(arguments) or DONE
    except UsageError as error:
        return _stop(WRONG, str(error))
    except PbsdError as error:
        return _stop(FAILED, _failure(error))
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except KeyboardInterrupt:
        return _stop(INTERRUPTED, "interrupted")


def _stop(code: int, message: str) -> int:
    print(f"pbsd: {message}", file=sys.stderr)
    return code


def parser() -> argparse.ArgumentParser:
    """The command line without the overrides, which `split_overrides` takes out first."""
    root = _Parser(prog="pbsd", description="RL post-training for LLM agents.", allow_abbrev=False)
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(parent: argparse._SubParsersAction, name: str, summary: str, run: Callable, **options: object):
        made = parent.add_parser(name, help=summary, description=summary, allow_abbrev=False, **options)
        made.set_defaults(run=run)
        return made

    overrides = "Any key can be set on top, e.g. --learner.optimizer.lr 1e-4; `pbsd config show CONFIG` lists them."
    train = command(commands, "train", "train as a configuration says", _train, epilog=overrides)
    train.add_argument("config", metavar="CONFIG", help="YAML file")
    train.add_argument("--resume", nargs="?", metavar="CHECKPOINT",
                       help="continue from the run's newest checkpoint, or from this one: step_40, best")
    train.add_argument("--ray-address", metavar="HOST:PORT", help="run on this Ray cluster, of which this machine is "
                       "one (default: start one here)")

    judge = command(commands, "evaluate", "evaluate the policy at model.path, without a learner", _evaluate,
                    epilog=overrides)
    judge.add_argument("config", metavar="CONFIG", help="YAML file")

    config = commands.add_parser("config", help="check, show or describe configurations", allow_abbrev=False)
    actions = config.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, summary, run in (("check", "report everything that is wrong with a configuration", _config_check),
                               ("show", "print the resolved configuration and what follows from it", _config_show)):
        action = command(actions, name, summary, run, epilog=overrides)
        action.add_argument("config", metavar="CONFIG", help="YAML file")
    command(actions, "schema", "print the JSON schema of configurations", _config_schema)

    seen = command(commands, "trajectories", "read what the policy did", _trajectories)
    seen.add_argument("folder", metavar="RUN", help="the run's folder")
    seen.add_argument("--step", type=int, help="which step (default: the last one recorded)")
    seen.add_argument("--group", help="only this group: its id, or its position in the step, from 0")
    seen.add_argument("--limit", type=int, default=4, help="at most so many trajectories (default: 4; 0: all)")
    outcome = seen.add_mutually_exclusive_group()
    outcome.add_argument("--solved", dest="solved", action="store_true", default=None, help="only solved ones")
    outcome.add_argument("--failed", dest="solved", action="store_false", help="only failed ones")
    seen.add_argument("--json", action="store_true", help="one JSON object per line")

    command(commands, "report", "build report.html from what a run recorded", _report).add_argument(
        "folder", metavar="RUN", help="the run's folder")

    checkpoint = commands.add_parser("checkpoint", help="list or verify checkpoints", allow_abbrev=False)
    actions = checkpoint.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, summary, run in (
            ("list", "which checkpoints there are, and why", _checkpoint_list),
            ("verify", "compare every file and tensor with what was written", _checkpoint_verify)):
        action = command(actions, name, summary, run)
        action.add_argument("folder", metavar="RUN_OR_FOLDER", help="a run's folder, its checkpoints, or one of these")
        action.add_argument("--json", action="store_true", help="print one line")
    convert = commands.add_parser("convert", help="models between Hugging Face and Megatron, and a look into both",
                                  allow_abbrev=False)
    add_commands(command, convert.add_subparsers(dest="action", required=True, metavar="ACTION"))

    reshard = command(commands, "reshard-plan", "show how new weights get from the learner to the engines",
                      _reshard_plan, epilog="Any key of CONFIG can be set on top, and the engines and links that are "
                      "planned for: --target.tp 16 --links.network_gb_s 25; docs/resharding.md lists them.")
    reshard.add_argument("config", metavar="CONFIG", help="YAML file")
    reshard.add_argument("--json", action="store_true", help="print one line")

    memory = command(commands, "memory", "show what a run will hold in memory, by phase and owner", _memory,
                     epilog=overrides)
    memory.add_argument("config", metavar="CONFIG", help="YAML file")
    memory.add_argument("--device", choices=("cpu", "cuda"), help="what it runs on (default: what is here)")
    memory.add_argument("--json", action="store_true", help="print one line")

    plan = command(commands, "plan", "recommend a layout for a number of GPUs: memory by phase, time by part", _plan,
                   epilog=overrides)
    plan.add_argument("config", metavar="CONFIG", help="YAML file")
    plan.add_argument("--gpus", type=int, help="how many, of learner and engines (default: the configuration's)")
    plan.add_argument("--gpu", help="which, e.g. h100-80g (default: cluster.gpu)")
    plan.add_argument("--gpus-per-node", type=int, help="that NVLink connects (default: the configuration's, or 8)")
    plan.add_argument("--mean-tokens", type=int, help="that a trajectory generates (default: half of what it may)")
    plan.add_argument("--runners-up", type=int, default=3, help="how many are shown (default: 3)")
    plan.add_argument("--json", action="store_true", help="print one line")

    simulate = command(commands, "simulate", "compare rollout policies on a simulated cluster", _simulate,
                       epilog="Any key of the workload can be set on top, e.g. --requests.correlation 0.5 --seeds 1.")
    simulate.add_argument("workload", metavar="WORKLOAD", help="YAML file, see configs/workloads")
    simulate.add_argument("--json", action="store_true", help="print one line")
    simulate.add_argument("--html", metavar="FILE", help="also draw what the engines did")

    add_slurm_commands(command, commands)
    add_node_command(command, commands)
    add_preflight_arguments(command(
        commands, "preflight", "look whether this machine, or a job's nodes, are fit for a run", _preflight))

    bench = command(commands, "bench", "measure one part", _bench, epilog=overrides)
    bench.add_argument("name", metavar="NAME", help="a module of launcher/bench")
    bench.add_argument("--json", action="store_true", help="print one line")
    return root


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are one message with the nearest valid choice."""

    def _check_value(self, action: argparse.Action, value: object) -> None:
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            raise argparse.ArgumentError(
                None, f"unknown {action.metavar or action.dest} {value!r}, expected one of {', '.join(choices)}"
                + did_you_mean(str(value), choices))


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """(command line, overrides). Of commands that read a configuration, every unknown `--flag` is an override."""
    command = " ".join(argv[:2] if argv[:1] == ["config"] else argv[:1])
    if command not in ("train", "evaluate", "simulate", "bench", "reshard-plan", "memory", "plan", "submit",
                       "config check", "config show"):
        return list(argv), []
    rest, overrides, remaining = [], [], list(argv)
    while remaining:
        token = remaining.pop(0)
        if token == "--resume":
            chosen = remaining.pop(0) if remaining and _is_checkpoint(remaining[0], rest) else "latest"
            token = f"--resume={chosen}"
        if not token.startswith("--") or token.partition("=")[0] in FLAGS:
            rest.append(token)
            continue
        if token.partition("=")[0] in VALUED.get(command, ()):
            rest += [token, *([] if "=" in token else remaining[:1])]
            remaining = remaining if "=" in token else remaining[1:]
            continue
        overrides.append(token)
        if "=" not in token and remaining and not remaining[0].startswith("--"):
            overrides.append(remaining.pop(0))
    return rest, overrides


def _is_checkpoint(token: str, before: Sequence[str]) -> bool:
    """Whether what follows `--resume` is its value. Once CONFIG has been given it can be nothing else."""
    return not token.startswith("--") and (
        len(before) > 1 or re.fullmatch(r"(step_)?\d+|latest|best", token) is not None)


def _train(arguments: argparse.Namespace) -> int:
    from launcher.overrides import load_config
    from megatron_pbsd.observability.records import read_metrics
    from megatron_pbsd.stopping import StopRequest

    config = load_config(arguments.config, arguments.overrides, to_run=True)
    if not arguments.resume and read_metrics(config.folder):
        raise UsageError(f"{config.folder} holds a run already: continue it with --resume, choose another --name, or "
                         "remove the folder")
    # What a scheduler sends before it kills: unwind as for Ctrl-C, so that no process stays behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    try:
        with StopRequest(config.folder).listening() as stop:
            from megatron_pbsd.train import main as train

            resume = arguments.resume
            done = train(config, f"step_{resume}" if resume and resume.isdigit() else resume, stop,
                         arguments.ray_address)
        print(f"report: {config.folder / 'report.html'}")
        if done < config.steps:
            return _stop(STOPPED, f"stopped at step {done} of {config.steps}, as asked, with a checkpoint; continue "
                                  f"with: pbsd train {arguments.config} --resume")
    except UsageError:
        raise
    except KeyboardInterrupt:
        return _stop(INTERRUPTED, f"interrupted; continue with: pbsd train {arguments.config} --resume")
    except Exception as error:
        log = config.folder / "error.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(traceback.format_exc(), encoding="utf-8")
        return _stop(FAILED, f"{_failure(error)}\n      (traceback: {log})")
    return DONE


def _failure(error: Exception) -> str:
    """`component: message`."""
    return f"{error.component}: {error}" if isinstance(error, PbsdError) else f"run: {type(error).__name__}: {error}"


def _evaluate(arguments: argparse.Namespace) -> None:
    import json

    from launcher.overrides import load_config
    from megatron_pbsd.evaluate import evaluate

    print(json.dumps(evaluate(load_config(arguments.config, arguments.overrides, to_run=True))))


def _config_check(arguments: argparse.Namespace) -> None:
    from launcher.overrides import load_config

    model = load_config(arguments.config, arguments.overrides).model
    elsewhere = model.shape is not None and not os.path.isdir(model.path)
    print(f"{arguments.config}: valid" + (
        f", with {model.shape} for model.path = {model.path}, which is not on this machine" if elsewhere else ""))


def _config_show(arguments: argparse.Namespace) -> None:
    import yaml

    from launcher.overrides import load_config
    from launcher.show import derived_values

    config = load_config(arguments.config, arguments.overrides, check_model=False)
    print(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    print("# what follows from it")
    for name, value, formula in derived_values(config):
        print(f"# {name:<32} {value:>8}   {formula}")


def _config_schema(arguments: argparse.Namespace) -> None:
    import json

    from megatron_pbsd.config import RunConfig

    print(json.dumps(RunConfig.model_json_schema(), indent=2))


def _trajectories(arguments: argparse.Namespace) -> None:
    from launcher.show import print_trajectories, select_trajectories
    from megatron_pbsd.observability.records import run_folder

    chosen = select_trajectories(run_folder(arguments.folder), arguments.step, arguments.group, arguments.solved,
                                 arguments.limit)
    print_trajectories(chosen, as_json=arguments.json)


def _report(arguments: argparse.Namespace) -> None:
    from megatron_pbsd.observability.records import run_folder
    from megatron_pbsd.observability.report import write_report

    print(write_report(run_folder(arguments.folder)))


def _checkpoint_list(arguments: argparse.Namespace) -> None:
    from launcher.checkpoints import checkpoints_of, listed, print_list

    print_list(listed(checkpoints_of(arguments.folder)), arguments.json)


def _checkpoint_verify(arguments: argparse.Namespace) -> int:
    from launcher.checkpoints import print_verified, verified

    results = verified(arguments.folder)
    print_verified(results, arguments.json)
    return FAILED if any(results.values()) else DONE


def _reshard_plan(arguments: argparse.Namespace) -> None:
    import json

    from launcher.reshard_plan import print_summary, summary

    found = summary(arguments.config, arguments.overrides)
    if arguments.json:
        print(json.dumps(found))
    else:
        print_summary(found)


def _memory(arguments: argparse.Namespace) -> None:
    import json

    from launcher.memory import account_of, as_json, print_account

    account = account_of(arguments.config, arguments.overrides, arguments.device)
    if arguments.json:
        print(json.dumps(as_json(account)))
    else:
        print_account(account)


def _plan(arguments: argparse.Namespace) -> int:
    import json

    from launcher.plan import Options, as_json, plan, print_plan

    found = plan(arguments.config, arguments.overrides, Options(
        arguments.gpus, arguments.gpu, arguments.gpus_per_node, arguments.mean_tokens, arguments.runners_up))
    if arguments.json:
        print(json.dumps(as_json(found)))
    else:
        print_plan(found)
    return FAILED if found.problems else DONE


def _simulate(arguments: argparse.Namespace) -> None:
    import json

    from launcher.simulate import load_workload, print_results
    from megatron_pbsd.simulation.experiment import run_experiment

    experiment = run_experiment(load_workload(arguments.workload, arguments.overrides),
                                lambda text: print(f"pbsd: {text}", file=sys.stderr))
    results = experiment.results()
    if arguments.json:
        print(json.dumps(results))
    else:
        print_results(results)
    if arguments.html:
        from megatron_pbsd.simulation.picture import write_picture

        write_picture(experiment, arguments.html)


def _preflight(arguments: argparse.Namespace) -> int:
    from launcher.preflight.command import run

    return run(arguments)


def _bench(arguments: argparse.Namespace) -> None:
    import json

    from launcher.bench import load_bench

    results = load_bench(arguments.name)(arguments.overrides)
    print(json.dumps(results, indent=None if arguments.json else 2))


if __name__ == "__main__":
    sys.exit(main())

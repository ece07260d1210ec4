"""A run's configuration → the script that Slurm runs: slurm/job.sh.j2, filled in. Pure."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

import jinja2

from megatron_pbsd.config import RunConfig

TEMPLATES = Path(__file__).parents[2] / "slurm"


def render(config: RunConfig, pbsd: str, workdir: str, seeds: str = "", excluded: Sequence[str] = ()) -> str:
    """The script of the run, or of one run for each seed.

    pbsd:      how the command is called there, as shell text; `cluster.slurm.command` comes first.
    workdir:   folder that the job works in, from which relative paths are.
    seeds:     as sbatch writes arrays, '1-4' or '1,5,9%2'; '' for one run.
    excluded:  nodes to leave out besides `cluster.slurm.exclude`.
    """
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), trim_blocks=True, lstrip_blocks=True,
                                     undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    slurm, folder = config.cluster.slurm, Path(workdir) / config.folder
    return environment.get_template("job.sh.j2").render(
        name=config.name, folder=shlex.quote(str(folder)), pbsd=slurm.command or pbsd, setup=slurm.setup,
        seeds=seeds, preflight=slurm.preflight, container=container_options(config, workdir),
        options=batch_options(config, folder, workdir, seeds, excluded))


def batch_options(config: RunConfig, folder: Path, workdir: str, seeds: str, excluded: Sequence[str]) -> list[str]:
    """What the script's #SBATCH lines say, in this order. Slurm reads them up to the first blank that is not quoted."""
    cluster, slurm = config.cluster, config.cluster.slurm
    nodes = str(cluster.nodes) if cluster.min_nodes is None else f"{cluster.min_nodes}-{cluster.nodes}"
    # The logs of an array lie together: its runs' folders are not known to Slurm.
    logs = folder.with_name(f"{folder.name}_seeds") if seeds else folder / "slurm"
    options = {
        "job-name": config.name, "partition": slurm.partition, "account": slurm.account, "qos": slurm.qos,
        "nodes": nodes, "ntasks-per-node": "1",
        "gres": f"{slurm.gres}:{cluster.gpus_per_node}" if cluster.gpus_per_node else "",
        "time": slurm.time_limit, "signal": f"B:USR1@{slurm.stop_before_s}",
        "exclude": ",".join(dict.fromkeys([*slurm.exclude, *excluded])), "array": seeds,
        "chdir": workdir, "output": f"{logs}/%A_%a.log" if seeds else f"{logs}/%j.log", "open-mode": "append",
    }
    lines = [f"--{name}={_quoted(value)}" for name, value in options.items() if value]
    lines += ["--exclusive", "--mem=0"] if slurm.exclusive else []
    lines.append("--requeue" if slurm.requeue else "--no-requeue")
    return lines + list(slurm.extra)


def container_options(config: RunConfig, workdir: str) -> list[str]:
    """What srun is told of the container, as shell words; nothing without one."""
    container = config.cluster.slurm.container
    if not container.image:
        return []
    words = [f"--container-image={container.image}", f"--container-workdir={container.workdir or workdir}"]
    words += [f"--container-mounts={','.join(container.mounts)}"] if container.mounts else []
    return [shlex.quote(word) for word in words]


def _quoted(value: str) -> str:
    return f'"{value}"' if " " in value else value

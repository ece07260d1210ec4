"""Job scripts, letter by letter: tests/launcher/slurm/golden. `python tests/launcher/slurm/test_script.py` writes them
anew; read the difference before it is committed."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from launcher.slurm.script import render
from megatron_pbsd.config import RunConfig
from megatron_pbsd.config.cluster import FIXED_OPTIONS, OWN_OPTIONS

GOLDEN = Path(__file__).parent / "golden"
PBSD, WORK = "/opt/pbsd/bin/pbsd", "/home/ada/work"
CASES = {
    "one_node": ({}, "", ()),
    "gpus": ({"nodes": 4, "gpus_per_node": 8, "min_nodes": 2, "slurm": {
        "partition": "main", "account": "agents", "qos": "normal", "gres": "gpu:h100", "time_limit": "1-00:00:00",
        "exclude": ["node7"], "setup": ["module load cuda/12.9", "export NCCL_SOCKET_IFNAME=ib0"],
        "extra": ["--reservation=tests"], "preflight": True}}, "", ("node3", "node7")),
    "container": ({"nodes": 2, "gpus_per_node": 8, "slurm": {
        "command": "/opt/pbsd/bin/pbsd", "requeue": False, "exclusive": False, "container": {
            "image": "/images/pbsd 1.sqsh", "mounts": ["/home/ada:/home/ada", "/data:/data:ro"],
            "workdir": "/home/ada/work"}}}, "", ()),
    "seeds": ({"slurm": {"stop_before_s": 60}}, "1-4%2", ()),
}


def rendered(case: str) -> str:
    cluster, seeds, excluded = CASES[case]
    config = RunConfig.model_validate({"name": "curve", "steps": 60, "model": {"path": "models/base"},
                                       "runs": "/data/my runs" if case == "gpus" else "runs", "cluster": cluster})
    return render(config, PBSD, WORK, seeds, excluded)


@pytest.mark.parametrize("case", CASES)
def test_scripts_are_as_they_were(case):
    assert rendered(case) == (GOLDEN / f"{case}.sh").read_text(encoding="utf-8")


@pytest.mark.slurm
@pytest.mark.parametrize("case", CASES)
def test_shellcheck_finds_nothing(case):
    done = subprocess.run(["shellcheck", "--severity=style", "-"], input=rendered(case), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_run_can_be_set_by_no_option_twice():
    """Whatever the script says to sbatch is no further option that a configuration may add."""
    said = {line.removeprefix("#SBATCH --").partition("=")[0] for case in CASES for line in rendered(case).splitlines()
            if line.startswith("#SBATCH")} - {"reservation"}
    assert said <= {*OWN_OPTIONS, *FIXED_OPTIONS}


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for name in CASES:
        (GOLDEN / f"{name}.sh").write_text(rendered(name), encoding="utf-8")

"""`pbsd preflight` as it is called: options, Slurm's variables, exit codes, files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from healthy_nodes import cluster, with_gpu

from launcher.cli import main
from launcher.overrides import load_config
from launcher.preflight.command import Nodes, nodes_of
from launcher.preflight.expected import expected_of
from launcher.preflight.facts import Disk
from launcher.preflight.findings import Expected
from launcher.preflight.report import exclude
from launcher.preflight.rules import diagnose, to_exclude
from launcher.preflight.slurm import node_names, rendezvous_port, step
from megatron_pbsd.errors import UsageError
from megatron_pbsd.memory_account import predict
from megatron_pbsd.platform.cpu import Cpu
from megatron_pbsd.ports import free_port

QUICKSTART = Path(__file__).parents[3] / "configs" / "quickstart.yaml"
STEP = {"SLURM_JOB_ID": "17", "SLURM_STEP_ID": "2", "SLURM_NODEID": "1", "SLURM_STEP_NODELIST": "gpu[07-08]"}


def options(**given):
    return Namespace(**{"nodes": None, "node_rank": None, "rendezvous": None, "shared": None} | given)


@pytest.mark.parametrize(("text", "names"), [
    ("node1", "node1"), ("node[1-3,7],login1", "node1 node2 node3 node7 login1"), ("gpu[008-011]", "gpu008 gpu009 "
     "gpu010 gpu011"), ("r[1-2]n[1-2]-ib", "r1n1-ib r1n2-ib r2n1-ib r2n2-ib"), ("a,b", "a b")])
def test_slurms_notation_of_hosts(text, names):
    assert " ".join(node_names(text)) == names


def test_what_is_no_list_of_hosts_is_refused():
    with pytest.raises(UsageError, match="no list of hosts"):
        node_names("node[1-3")


def test_in_a_step_of_slurm_nodes_find_each_other(tmp_path):
    nodes = nodes_of(options(shared=str(tmp_path)), None, STEP)
    assert nodes == Nodes(1, 2, ("gpu07", 20000 + 17 * 7 + 2), ("gpu07", "gpu08"), tmp_path)
    assert rendezvous_port(STEP) != rendezvous_port(STEP | {"SLURM_RESTART_COUNT": "1"})
    assert step(STEP | {"SLURM_STEP_ID": "4294967291"}) is None, "the job's script"
    assert step({}) is None and step(STEP | {"SLURM_STEP_NODELIST": "gpu07", "SLURM_NODEID": "0"}) is None
    with pytest.raises(UsageError, match="SLURM_NODEID = 5 is none"):
        step(STEP | {"SLURM_NODEID": "5"})
    with pytest.raises(UsageError, match="--ntasks-per-node=1"):
        step(STEP | {"SLURM_LOCALID": "1"})


def test_the_folder_of_the_run_is_the_one_that_is_shared():
    config = load_config(QUICKSTART, check_model=False)
    assert nodes_of(options(), config, STEP).shared == config.folder
    assert nodes_of(options(), config, {}) == Nodes(0, 1)
    with pytest.raises(UsageError, match="give CONFIG, or --shared"):
        nodes_of(options(), None, STEP)


def test_everything_that_is_wrong_with_options_is_said():
    with pytest.raises(UsageError, match="missing: --node-rank, --rendezvous, --shared or CONFIG"):
        nodes_of(options(nodes=2), None, {})
    with pytest.raises(UsageError, match="(?s)--node-rank = 2.*--rendezvous = 'host'"):
        nodes_of(options(nodes=2, node_rank=2, rendezvous="host", shared="x"), None, {})


def test_a_configuration_says_what_is_needed():
    quickstart = load_config(QUICKSTART, check_model=False)
    assert expected_of(quickstart) == Expected(gpus=0)
    large = load_config(QUICKSTART, ("--cluster.gpus_per_node", "8", "--cluster.gpu", "h100-80g",
                                     "--checkpoint.keep", "3000", "--learner.precision", "float32"), check_model=False)
    needed = expected_of(large)
    account = predict(quickstart, Cpu())
    kept = sum(owner.nbytes for owner in account.owners if owner.part in ("parameters", "optimizer_state"))
    assert (needed.gpus, needed.gpu) == (8, "h100-80g")
    assert needed.run_bytes == pytest.approx(3001 * kept, rel=0.01), "the account of `pbsd memory`"


def test_bad_nodes_are_added_to_the_list(tmp_path):
    file = tmp_path / "job" / "excluded.txt"
    observed = with_gpu(cluster(), 2, 0, volatile_ecc=1)
    exclude(file, to_exclude(observed, diagnose(observed, Expected())))
    exclude(file, ["node9", "node2"])
    assert file.read_text() == "node2\nnode9\n" and list(file.parent.iterdir()) == [file]


def test_alone_on_this_machine(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = main(["preflight", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert code == (0 if found["ok"] else 1) and found["exclude"] == [] and not list(tmp_path.iterdir())
    (node,) = found["observed"]["nodes"]
    assert node["failures"] == {} and Disk(**node["disks"][0]).path == str(tmp_path)
    assert main(["preflight"]) == code
    assert "run folder" in capsys.readouterr().out


def test_two_nodes_through_the_command_line(tmp_path):
    """A run that needs GPUs on machines that have none: both exit with 1, and node 0 says why."""
    config, port = tmp_path / "run.yaml", free_port()
    config.write_text(QUICKSTART.read_text() + f"\nruns: {tmp_path}\ncluster: {{nodes: 2, gpus_per_node: 4}}\n")
    command = [sys.executable, "-m", "launcher.cli", "preflight", str(config), "--json", "--nodes", "2", "--rendezvous",
               f"127.0.0.1:{port}", "--exclude-file", str(tmp_path / "excluded"), "--deadline", "60", "--node-rank"]
    nodes = [subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                              cwd=QUICKSTART.parents[1], env=os.environ | {"SLURMD_NODENAME": f"node{rank}"})
             for rank in range(2)]
    said = [node.communicate(timeout=150) for node in nodes]
    assert [node.returncode for node in nodes] == [1, 1], said
    assert said[1] == ("", "")
    found = json.loads(said[0][0])
    wanted = {("GPU count", "node0", "0", "4"), ("GPU count", "node1", "0", "4")}
    assert wanted <= {(one["check"], one["node"], one["measured"], one["expected"]) for one in found["findings"]}
    assert [pair["gb_s"] > 0 for pair in found["observed"]["pairs"]] == [True]
    assert not (tmp_path / "excluded").exists(), "it is not the nodes that are at fault"
    (report,) = tmp_path.glob("*/preflight.json")
    assert json.loads(report.read_text()) == found

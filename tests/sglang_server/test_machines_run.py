"""A whole run on two machines with one server on both."""

from __future__ import annotations

import os
import signal

import yaml
from machines import Machines
from pbsd_nodes import START_S, Run, left_of
from pbsd_process import QUICKSTART
from sglang_server.servers import ARGS, ENVIRONMENT, section


def test_a_server_on_two_machines_of_which_one_loses_its_processes(tmp_path):
    config = yaml.safe_load(QUICKSTART.read_text()) | {"steps": 2}
    config["rollout"] |= {
        "engine": "sglang", "engines": 1, "slots": 16, "prompts_per_step": 4, "group_size": 4, "policy": "divided",
        "chunk_tokens": 16, "deadline_s": 200.0, "speculation": {"enabled": True}, "transport": {"kind": "disk"},
        "sleep": "all", "sglang": section(
            args=ARGS | {"max_total_tokens": 16384, "tp_size": 2, "nnodes": 2},
            environment=ENVIRONMENT | {"SGLANG_CPU_OMP_THREADS_BIND": "0"})}
    config["evaluation"] |= {"at_start": False, "every": 0, "prompts": 8}
    config["learner"]["updates_per_step"] = 1
    config["checkpoint"] = {"every": 0, "export_hf": "never"}
    source = tmp_path / "config.yaml"
    source.write_text(yaml.safe_dump(config))
    machines = Machines(2, tmp_path.resolve())
    try:
        run = Run(machines, machines.names, tmp_path.resolve() / "run", source=source)
        run.start()
        run.go_on_for(1)
        schedulers = {name: machines.processes(name, "sglang::scheduler") for name in machines.names}
        assert all(len(found) == 1 for found in schedulers.values())
        os.kill(schedulers["node2"][0], signal.SIGKILL)
        assert run.ends(START_S) == {"node1": 0, "node2": 0}, run.said()
        said, rows = run.said(), {row["step"]: row for row in run.rows()}
        assert "engine-0 died: engine-0.node1: its processes ended" in said and "it is started anew" in said
        for step in (1, 2):
            assert rows[step]["weights/probe_max_abs"] <= 2e-5 and rows[step]["loss/mismatch_max_abs"] <= 2e-5
            assert rows[step]["speculation/acceptance_length"] > 1.2 and rows[step]["grad_norm"] > 0
        logs = run.folder / "logs"
        assert (logs / "engine-0.sglang.log").stat().st_size and (logs / "engine-0.node1.sglang.log").stat().st_size
        assert not list((run.folder / "engines" / "engine-0").iterdir())
        assert left_of(machines) == [] and not any(machines.processes(name, "sglang") for name in machines.names)
    finally:
        machines.close()

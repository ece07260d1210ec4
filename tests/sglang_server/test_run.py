"""Reinforcement learning with SGLang engines and Megatron learners, through the command line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import psutil
import pytest
import yaml
from pbsd_process import QUICKSTART, ROOT, Run, none_left
from sglang_server.servers import ARGS, section


def start(folder, transport="segment", **sglang) -> Run:
    """`pbsd train` on a small quickstart with two servers; two learner ranks share each tensor."""
    config = yaml.safe_load(QUICKSTART.read_text()) | {"name": "sglang", "runs": str(folder), "steps": 2}
    config["rollout"] |= {
        "engine": "sglang", "slots": 16, "prompts_per_step": 4, "group_size": 4, "policy": "divided",
        "chunk_tokens": 16, "deadline_s": 200.0, "speculation": {"enabled": True}, "transport": {"kind": transport},
        "sleep": "all",
        "sglang": section(args=ARGS | {"max_total_tokens": 16384} | sglang)}
    config["evaluation"] |= {"at_start": False, "every": 0, "prompts": 8}
    config["learner"]["updates_per_step"] = 1
    config["checkpoint"] = {"every": 0, "export_hf": "never"}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    process = subprocess.Popen([sys.executable, "-m", "launcher.cli", "train", str(path)], cwd=ROOT,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)
    return Run(process, folder / "sglang", deadline_s=600)


@pytest.mark.parametrize("transport", ["segment", "collective"])
def test_two_steps_in_one_of_which_a_server_dies(tmp_path, transport):
    """Rollout, training, publication and its proof, while servers sleep in turn with the learner's passes; the server
    that is killed is started anew, with the new weights."""
    run = start(tmp_path, transport)
    run.wait_for_step(1)
    family = run.family()
    schedulers = [process for process in family if "sglang::scheduler" in " ".join(process.cmdline())]
    assert len(schedulers) == 2
    os.kill(schedulers[0].pid, signal.SIGKILL)
    code, errors = run.finish()
    assert code == 0, errors
    assert "engine-" in errors and "it is started anew" in errors and "its server" in errors
    rows = {row["step"]: row for row in run.rows()}
    for step in (1, 2):
        # Of log-probs down to -20 or so, in float32; measured: 9.5e-6.
        assert rows[step]["weights/probe_max_abs"] <= 2e-5
        # What the engines sampled with is what the learner computes for the same tokens: the first update is on policy.
        assert rows[step]["loss/mismatch_max_abs"] <= 2e-5 and rows[step]["grad_norm"] > 0
        assert rows[step]["speculation/acceptance_length"] > 1.2
        assert rows[step]["memory/train/used_gb"] > 0 and rows[step]["memory/publish/predicted_gb"] > 0
    assert rows[2]["rollout/engine_deaths"] == 1
    assert none_left(family)
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(run.folder) in " ".join(p.info["cmdline"] or ())]


def test_arguments_that_sglang_does_not_have_end_it_before_anything_starts(tmp_path):
    run = start(tmp_path, tp_sise=2, port=1)
    code, errors = run.finish()
    assert code == 2 and "did you mean 'tp_size'?" in errors and "args.port is set by rollout.sglang.port" in errors
    assert not run.folder.exists()

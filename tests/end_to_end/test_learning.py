"""The quickstart in short: it learns, from the tool, and leaves behind what it promises."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from pbsd_process import INLINE, QUICKSTART, ROOT, SMALL

pytestmark = pytest.mark.slow
STEPS = 12


@pytest.fixture(scope="module")
def trained(pbsd):
    run = pbsd("learning", "--steps", str(STEPS), "--evaluation.every", "0")
    run.succeed()
    return run


def test_exact_match_on_unseen_entities_rises(trained):
    evaluated = [row["eval/exact_match"] for row in trained.rows() if "eval/exact_match" in row]
    assert len(evaluated) == 2
    assert evaluated[0] <= 0.40
    assert evaluated[1] >= evaluated[0] + 0.20


def test_answers_come_from_the_tool(trained):
    """The same policy, with a retriever that finds nothing."""
    command = [sys.executable, "-m", "launcher.cli", "evaluate", str(QUICKSTART), *INLINE,
               "--environment.retriever", "none", "--model.path", str(trained.folder / "exported")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["eval/exact_match"] < 0.10


def test_every_step_reports_what_the_readme_promises(trained):
    rows = trained.rows()
    assert [row["step"] for row in rows] == list(range(STEPS + 1))
    for row in rows[1:]:
        for key in ("reward/mean", "rollout/tokens_per_s", "credit/evidence_per_token", "loss/ratio_mean",
                    "loss/clip_fraction", "loss/entropy", "loss/kl_rollout", "time/rollout_s", "time/train_s"):
            assert key in row, key
        assert row["weights/probe_max_abs"] < 1e-4
        # Engine and learner agree on what was sampled: nothing is stale.
        assert row["loss/mismatch_max_abs"] < 1e-3


def test_the_run_folder_is_complete(trained):
    from transformers import AutoModelForCausalLM

    from megatron_pbsd.observability.records import read_trajectories

    folder = trained.folder
    report = (folder / "report.html").read_text()
    assert "<svg" in report and "src=\"http" not in report and "href=\"http" not in report
    assert json.loads((folder / "trace.json").read_text())
    trajectories = [record.trajectory for record in read_trajectories(folder, STEPS)]
    assert len(trajectories) == 128
    for trajectory in trajectories:
        assert trajectory.reward in (0.0, 1.0)
        assert len(trajectory.evidence) == len(trajectory.turn_advantages) == len(trajectory.turns)
    assert not list((folder / "trajectories").glob("*.unscored.jsonl"))
    model = AutoModelForCausalLM.from_pretrained(folder / "exported", local_files_only=True)
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()


def test_another_layout_gives_the_same_losses(pbsd):
    tp2 = pbsd("tp2", *SMALL, "--steps", "2").succeed()
    rows = pbsd("pp2", *SMALL, "--steps", "2", "--learner.parallel.tp", "1", "--learner.parallel.pp", "2").succeed()
    for ours, theirs in zip(rows[1:], tp2[1:], strict=True):
        for key in ("reward/mean", "loss/total", "loss/entropy", "grad_norm", "credit/evidence_per_token"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-5), key

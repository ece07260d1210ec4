"""A mixture-of-experts policy through the whole loop: the learner routes as the engine did."""

from __future__ import annotations

import shutil

import pytest
from pbsd_process import ROOT, SMALL
from tiny_models import make_tiny

from megatron_pbsd.observability.records import read_trajectories

pytestmark = pytest.mark.slow
BASE = ROOT / "assets" / "search_qa_base"


@pytest.mark.parametrize(("model", "recompute"), [("qwen3_moe", "auto"), ("deepseek_v3", "always")])
def test_engine_and_learner_agree_on_experts(pbsd, tmp_path, model, recompute):
    """Two expert-parallel ranks and two engines, without and with a pass for the old log-probs. Of all families, each
    side is compared with transformers in tests/distributed/test_families.py and tests/rollout/embedded."""
    folder = make_tiny(model, tmp_path / model, vocab_size=2048, max_position_embeddings=1024)
    shutil.copy(BASE / "tokenizer.json", folder)
    run = pbsd(model, *SMALL, "--steps", "2", "--model.path", str(folder), "--learner.parallel.tp", "1",
               "--learner.parallel.ep", "2", "--learner.moe.routing_replay", "true", "--learner.recompute_log_probs",
               recompute)
    for row in run.succeed()[1:]:
        assert row["loss/mismatch_max_abs"] < 1e-3
        assert row["weights/probe_max_abs"] < 1e-4
        assert row["loss/ratio_max"] == pytest.approx(1, abs=1e-3)
        assert row["router/layer_01/load_max"] >= 1 and row["router/layer_01/dropped"] == 0
    for recorded in read_trajectories(run.folder, 2):
        experts = recorded.trajectory.routed_experts
        assert len(experts) == len(recorded.trajectory.prompt) + len(recorded.trajectory.continuation)
        assert (experts[:-1] >= 0).all()

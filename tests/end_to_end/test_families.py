"""Engine and learner of one policy agree: rotary frequencies, a padded vocabulary, stages of unequal length.

Of all families, each side is compared with transformers in tests/distributed/test_families.py and
tests/rollout/embedded.
"""

from __future__ import annotations

import json
import shutil

import pytest
from pbsd_process import ROOT, SMALL
from tiny_models import make_tiny

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("model_type", "changes", "layout"), [
    ("qwen2", {"tie_word_embeddings": True, "num_hidden_layers": 5}, {"tp": 1, "pp": 2}),
    ("kimi_k2", {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 3}, {"tp": 1, "pp": 2}),
])
def test_policy_of_the_engine_is_that_of_the_learner(pbsd, tmp_path, model_type, changes, layout):
    known = "deepseek_v3" if model_type == "kimi_k2" else model_type
    folder = make_tiny(known, tmp_path / model_type, vocab_size=2049, max_position_embeddings=1024, **changes)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": model_type}))
    shutil.copy(ROOT / "assets" / "search_qa_base" / "tokenizer.json", folder)
    sizes = [word for key, size in layout.items() for word in (f"--learner.parallel.{key}", str(size))]
    run = pbsd(model_type, *SMALL, "--steps", "2", "--model.path", str(folder), *sizes,
               "--learner.recompute_log_probs", "always")
    for row in run.succeed()[1:]:
        assert row["loss/mismatch_max_abs"] < 1e-3
        assert row["weights/probe_max_abs"] < 1e-4
        assert row["loss/ratio_max"] == pytest.approx(1, abs=1e-3)

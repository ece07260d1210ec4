"""`pbsd reshard-plan`: its table, its JSON, and everything that is wrong at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.cli import main
from launcher.reshard_plan import load
from launcher.sources import ConfigError

ROOT = Path(__file__).parents[2]
QUICKSTART = [str(ROOT / "configs" / "quickstart.yaml"), "--model.path", str(ROOT / "assets" / "search_qa_base")]


def test_same_layout_on_the_same_gpus_moves_nothing(capsys):
    assert main(["reshard-plan", *QUICKSTART, "--target.engine", "sglang", "--target.tp", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["moved_bytes"], found["source_dtype"]) == (0, "bfloat16")
    # Norms are on both ranks.
    assert 2 * found["parameters"] < found["links"]["device"]["bytes"] < 2.1 * found["parameters"]


def test_seconds_are_those_of_the_rank_that_has_most(capsys):
    arguments = ["--links.devices_per_node", "1", "--links.network_gb_s", "0.001", "--links.bucket_mb", "1"]
    assert main(["reshard-plan", *QUICKSTART, "--json", *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    network, whole = found["links"]["network"], 4 * found["parameters"]
    # Each embedded engine lacks what is on the other rank only; buckets also hold what comes from its own GPU.
    assert found["links"]["device"]["bytes"] + network["bytes"] == 2 * whole
    assert found["predicted_s"] == pytest.approx(max(network["sent"]["max"], network["received"]["max"]) / 1e6)
    assert whole / 2**20 <= found["buckets"]["min"] <= found["buckets"]["max"] <= 2 * whole / 2**20 + 1


def test_table(capsys):
    assert main(["reshard-plan", *QUICKSTART]) == 0
    out = capsys.readouterr().out
    assert "0.001 · 10⁹ parameters, 2 ranks (float32) → 2 ranks (float32)" in out
    assert [line.split()[0] for line in out.splitlines()[2:5]] == ["device", "node", "network"]


def test_all_problems_at_once():
    with pytest.raises(ConfigError) as raised:
        load(QUICKSTART[0], [*QUICKSTART[1:], "--target.tpp", "3", "--steps", "x", "--links.bucket_mb", "0"])
    text = str(raised.value)
    assert "3 problems" in text and "target.tpp = 3   (command line)\n      unknown key; did you mean 'tp'?" in text
    with pytest.raises(ConfigError) as raised:
        load(QUICKSTART[0], [*QUICKSTART[1:], "--target.engine=sglang", "--target.tp=3", "--learner.parallel.tp=8",
                             "--learner.parallel.world_size", "8"])
    text = str(raised.value)
    assert "learner.parallel.tp = 8 does not divide num_attention_heads = 4" in text
    assert "target.tp = 3 does not divide num_attention_heads = 4; valid for this model: [1, 2, 4]" in text
    assert "= 6 is not learner.parallel.world_size = 8; tp * pp may be one of [1, 2, 4, 8]" in text


def test_parts_of_blocks_have_no_scale():
    with pytest.raises(ConfigError) as raised:
        load(QUICKSTART[0], [*QUICKSTART[1:], "--target.engine=sglang", "--target.tp=2",
                             "--target.dtype=float8_e4m3fn"])
    assert "o_proj.weight: a rank's part has shape (128, 64), which is not whole blocks of (128, 128)" in str(
        raised.value)

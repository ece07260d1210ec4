"""Every recipe of configs/ that is for GPUs: valid without its model, of the published size, and within a GPU."""

from __future__ import annotations

import json
import re
from math import prod
from pathlib import Path

import pytest

from launcher.cli import main
from launcher.overrides import load_config
from launcher.sources import read_yaml
from megatron_pbsd.config import RunConfig
from megatron_pbsd.memory_account import engine_bytes, learner_bytes
from megatron_pbsd.models import family, sglang
from megatron_pbsd.models.decoder import hf_tensors
from megatron_pbsd.models.shape import config_of
from megatron_pbsd.platform.cuda import Cuda

ROOT = Path(__file__).parents[2]
RECIPES = {path.stem: str(path) for path in sorted((ROOT / "configs").glob("*_h100x*.yaml"))}
PUBLISHED = {"qwen3_1_7b": 1.72e9, "qwen3_8b": 8.19e9, "qwen3_30b_a3b": 30.5e9, "qwen3_235b_a22b": 235e9,
             "deepseek_v3": 671e9, "kimi_k2": 1.026e12}
"""Model → parameters, multi-token prediction left out. Kimi-K2's report says 1.04 · 10¹², its checkpoint has 1.026."""
H100_BYTES, OTHERS = 85e9, 8e9
"""Of an H100 with 80 GiB; what contexts, collectives and the activations of a layer are left at least."""


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(params=RECIPES)
def name(request) -> str:
    return request.param


@pytest.fixture
def config(name) -> RunConfig:
    return load_config(RECIPES[name])


def test_there_is_one_for_each_size_of_cluster():
    assert sorted(int(name.rpartition("x")[2]) for name in RECIPES) == [1, 8, 32, 128, 256, 512]
    assert {name.partition("_h100")[0] for name in RECIPES} == set(PUBLISHED)


def test_it_is_valid_where_the_model_is_not(name, config, capsys):
    assert main(["config", "check", RECIPES[name]]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert f": valid, with {config.model.shape} for model.path = {config.model.path}, which is not" in printed.out


def test_training_asks_for_the_model(name, capsys):
    assert main(["train", RECIPES[name]]) == 2
    assert re.search(r"1 problem:\n\n +model\.path = .*\n +no such folder", capsys.readouterr().err)


def test_the_model_has_as_many_parameters_as_are_published(name, config):
    hf = config_of(config.model)
    counted = sum(map(prod, family(hf).hf_tensors(hf).values()))
    assert counted == pytest.approx(PUBLISHED[name.partition("_h100")[0]], rel=0.01)


def test_learner_and_engines_fill_the_cluster(name, config):
    hf, learner, rollout = config_of(config.model), config.learner.parallel, config.rollout
    decoder = family(hf).decoder(hf)
    gpus = config.cluster.nodes * config.cluster.gpus_per_node
    server = sglang.server_of(rollout.sglang.args)
    assert learner.world_size == rollout.engines * server.size == gpus and name.endswith(f"_h100x{gpus}")
    assert (config.name, config.cluster.gpu) == (name, "h100-80g")
    assert family(hf).layout_problems(hf, learner) == sglang.problems(decoder, server) == []
    # The learner's tensor-parallel ranks talk all the time: they stay on a node.
    assert config.cluster.gpus_per_node % learner.tp == 0
    trajectories = rollout.prompts_per_step * rollout.group_size
    assert trajectories % rollout.engines == 0 and rollout.prompts_per_step % config.learner.updates_per_step == 0
    assert rollout.max_turns * rollout.max_turn_tokens < rollout.max_context
    assert rollout.max_context <= decoder.max_position_embeddings


def test_every_phase_fits_a_gpu(config):
    """As `pbsd memory` counts; and the engines can start beside a learner that has not made a step yet."""
    hf, platform = config_of(config.model), Cuda()
    ranks = learner_bytes(hf, config.learner, platform, value_head=False)

    def most(*categories: str) -> int:
        return max(sum(rank[category] for category in categories) for rank in ranks)

    engine, unknown = engine_bytes(hf, config, platform)
    size = sglang.server_of(config.rollout.sglang.args).size
    weights, cache = engine["weights"] / size, engine["kv_cache"] / size
    assert not unknown and config.learner.release_memory and config.rollout.sleep == "all"
    starting = most("parameters", "gradients", "master_weights")
    phases = {
        "start": starting + weights + cache, "train": most(*ranks[0]), "publish": most("parameters") + weights,
        "rollout": weights + cache, "save": most("parameters", "master_weights", "optimizer_state") + weights}
    assert max(phases.values()) < H100_BYTES - OTHERS, phases
    free = H100_BYTES - starting
    assert weights + cache <= config.rollout.sglang.args["mem_fraction_static"] * free
    assert config.rollout.sglang.args["max_total_tokens"] >= 8 * config.rollout.max_context


def test_new_weights_have_a_way_to_the_engines(name, config, capsys):
    """Planned to the servers' own layout, which the configuration names."""
    assert main(["reshard-plan", RECIPES[name], "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["source_ranks"] == found["target_ranks"] == config.learner.parallel.world_size
    assert (found["source_dtype"], found["target_dtype"]) == ("bfloat16", "bfloat16")
    hf = config_of(config.model)
    assert found["parameters"] == sum(map(prod, hf_tensors(family(hf).decoder(hf)).values()))
    # Shared memory ends at the node.
    assert (config.rollout.transport.kind == "disk") == (config.cluster.nodes > 1)


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=() if name.endswith(("x1", "x8")) else pytest.mark.slow) for name in RECIPES])
def test_the_planner_finds_that_it_fits(name, config, capsys):
    """Activations included; the layouts that it compares with are many for many GPUs."""
    assert main(["plan", RECIPES[name], "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    configured, parallel = found["configured"], config.learner.parallel
    assert found["problems"] == [] and configured["fits"] and found["gpus"] == parallel.world_size
    assert {size: configured["layout"][size] for size in ("tp", "pp", "cp", "dp", "ep")} == {
        size: getattr(parallel, size) for size in ("tp", "pp", "cp", "dp", "ep")}
    assert max(configured["memory_gb_by_phase"].values()) < found["room_gb"]


def test_whatever_is_not_the_default_says_why(name, config):
    path = Path(RECIPES[name])
    lines, settings = path.read_text().splitlines(), read_yaml(path)
    plain = RunConfig(name="plain", steps=1, model={"path": "."}).model_dump(mode="json")
    required = [("name",), ("steps",), ("model", "path")]
    silent = []
    for keys, source in settings.sources.items():
        given, default = settings.values, plain
        for key in keys:
            given, default = given[key], default.get(key) if isinstance(default, dict) else None
        line = lines[int(source.rpartition(":")[2]) - 1]
        if not isinstance(given, dict) and given != default and keys not in required and "#" not in line:
            silent.append(".".join(keys))
    assert not silent
    # Sources are named once, at the top.
    head = "".join(line for line in lines if line.startswith("#"))
    assert set(re.findall(r"\[\w+\]", path.read_text())) == set(re.findall(r"\[\w+\]", head))

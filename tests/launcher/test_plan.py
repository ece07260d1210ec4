"""`pbsd plan` on configurations of published models: what it recommends is the best there is, what it says would help
helps."""

from __future__ import annotations

import json
import re
import time

import pytest
import yaml

from launcher.cli import main
from launcher.plan import Options, plan
from launcher.published_layouts import KIMI_K2, QWEN3_8B, QWEN3_30B
from megatron_pbsd.errors import UsageError
from megatron_pbsd.planning.search import evaluate, layouts

SIZES = ("tp", "pp", "vpp", "cp", "ep", "etp")


def write(folder, hf, *, parallel, engine, **learner):
    (folder / "config.json").write_text(json.dumps(hf))
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({
        "name": "n", "steps": 1, "model": {"path": str(folder)},
        "cluster": {"nodes": -(-parallel["world_size"] // 8), "gpus_per_node": 8, "gpu": "h100-80g"},
        "learner": {"parallel": parallel, "release_memory": True, "micro_batch_tokens": 8192} | learner,
        "rollout": {"engine": "sglang", "engines": 2, "sleep": "all", "slots": 64, "max_turns": 1,
                    "max_turn_tokens": 6144, "max_context": 8192, "sglang": {"python": "python", "args": engine}}}))
    return path


def qwen(folder, hf=QWEN3_30B, **sizes):
    return write(folder, hf, parallel={"world_size": 16, "tp": 4} | sizes, engine={"tp_size": 4})


def test_the_recommended_layout_is_the_fastest_that_fits(tmp_path):
    found = plan(qwen(tmp_path, world_size=8, ep=8), [], Options())
    candidates = [evaluate(found.question, layout) for layout in layouts(found.question)]
    best = min((one for one in candidates if one.fits), key=lambda one: one.seconds)
    recommended = next(row.candidate for row in found.rows if row.name == "recommended")
    assert recommended.seconds == pytest.approx(best.seconds) and found.fitting == sum(one.fits for one in candidates)
    room = found.question.cluster.available
    assert all(sum(owners.values()) <= room for owners in recommended.phases.values())
    times = [row.candidate.seconds for row in found.rows[1:]]
    assert times == sorted(times) and len(times) == 4


def test_what_would_help_helps(tmp_path):
    """Each remedy of a layout that does not fit is tried."""
    path = qwen(tmp_path, QWEN3_8B, world_size=8, tp=2)
    overrides = ["--learner.micro_batch_tokens", "65536"]
    found = plan(path, overrides, Options())
    problem = next(text for text in found.problems if text.startswith("the configured layout needs"))
    assert "'train'" in problem
    remedies = problem.partition("any of these would do: ")[2].split("; ")
    assert any("recompute" in text for text in remedies)
    for text in remedies:
        if match := re.fullmatch(r"learner\.(\w+)(?::| <=) (\w+)", text):
            changed = plan(path, [*overrides, f"--learner.{match[1]}", match[2]], Options())
            assert not changed.problems, text
    tokens = int(re.search(r"micro_batch_tokens <= (\d+)", problem)[1])
    assert plan(path, ["--learner.micro_batch_tokens", str(tokens + 1)], Options()).problems


def test_nothing_fits_and_it_says_what_would(tmp_path, capsys):
    path = qwen(tmp_path)
    assert main(["plan", str(path), "--gpus", "4", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["layout"] is None and found["step_s"] is None and found["configured"] is None
    count = int(re.search(r"(\d+) GPUs instead of 4", found["problems"][-1])[1])
    assert main(["plan", str(path), "--gpus", str(count), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layout"]["world_size"] == count


def test_servers_that_are_too_small_are_named(tmp_path):
    found = plan(write(tmp_path, QWEN3_8B | {"hidden_size": 32768, "head_dim": 1024, "intermediate_size": 98304},
                       parallel={"world_size": 8, "tp": 8}, engine={"tp_size": 1}), [], Options())
    assert any("its weights take" in problem and "tp_size" in problem for problem in found.problems)


def test_replicas_of_attention_are_advised_where_kv_is_copied_and_too_little(tmp_path, capsys):
    """Four key-value heads on eight ranks: two replicas have twice the room in the same memory, four divide no more."""
    def planned(*overrides):
        path = write(tmp_path, QWEN3_30B, parallel={"world_size": 16, "tp": 4, "ep": 8},
                     engine={"tp_size": 8, "max_total_tokens": 65536})
        main(["plan", str(path), "--json", *overrides])
        return json.loads(capsys.readouterr().out)

    found = planned()
    (advice,) = found["advice"]
    said = re.fullmatch(r"rollouts would take ([\d.]+) s in place of ([\d.]+) with rollout.sglang.args "
                        "attn_dp_size: 2, and the configured layout fit: .*", advice)
    taken = found["configured"]["step_s_by_part"]["rollout"]
    more = planned("--rollout.sglang.args.attn_dp_size", "2")
    assert float(said[2]) == pytest.approx(taken, abs=0.1) and float(said[1]) < 0.9 * taken
    assert float(said[1]) == pytest.approx(more["configured"]["step_s_by_part"]["rollout"], abs=0.1)
    assert more["configured"]["fits"] and more["advice"] == []
    # Where all have room already there is nothing to gain.
    assert planned("--rollout.sglang.args.max_total_tokens", "1000000")["advice"] == []


def test_json_and_the_table_have_the_same(tmp_path, capsys):
    path = qwen(tmp_path, ep=8)
    assert main(["plan", str(path), "--json", "--gpus=16", "--learner.recompute", "full"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"seconds", "layout", "memory_gb_by_phase", "step_s"} <= set(found)
    assert set(found["memory_gb_by_phase"]) == {"train", "publish", "rollout", "save"}
    for phase, owners in found["memory_gb_by_owner"].items():
        assert found["memory_gb_by_phase"][phase] == pytest.approx(sum(owners.values())) and "learner context" in owners
    assert found["step_s"] == pytest.approx(sum(found["step_s_by_part"].values()))
    assert found["configured"]["layout"]["recompute"] == "full"
    assert main(["plan", str(path)]) == 0
    text = capsys.readouterr().out
    row = next(line for line in text.splitlines() if line.startswith("recommended")).split()
    assert row[1:7] == [str(found["layout"][name]) for name in ("tp", "pp", "vpp", "cp", "dp", "ep")]


def test_an_unknown_gpu_is_told_with_the_nearest(tmp_path):
    with pytest.raises(UsageError, match="'h100-80gb' is unknown.*did you mean 'h100-80g'"):
        plan(qwen(tmp_path), [], Options(gpu="h100-80gb"))


def test_the_quickstart_is_planned_for_cores(capsys):
    assert main(["plan", "configs/quickstart.yaml", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["layout"]["world_size"] == 2 and found["gpu_gb"] == 4


@pytest.mark.slow
def test_a_trillion_parameters_on_1024_gpus_in_20_seconds(tmp_path):
    path = write(tmp_path, KIMI_K2, parallel={"world_size": 1024, "tp": 8, "pp": 8, "ep": 32},
                 engine={"tp_size": 64, "ep_size": 64}, recompute="full")
    started = time.process_time()
    found = plan(path, [], Options())
    assert found.fitting and time.process_time() - started < 20


def test_engines_have_gpus_of_their_own_where_there_are_enough(tmp_path):
    """Other numbers of GPUs are divided as the configuration's are."""
    path = qwen(tmp_path, QWEN3_8B)
    overrides = ["--learner.release_memory", "false", "--rollout.sleep", "none", "--cluster.nodes", "3"]
    shared, apart = (plan(path, given, Options(runners_up=0)) for given in ([], overrides))
    assert shared.question.colocated and not apart.question.colocated
    assert shared.question.cluster.count == apart.question.cluster.count == 16
    larger = plan(path, overrides, Options(gpus=48, runners_up=0))
    assert (larger.question.cluster.count, larger.fleet.count) == (32, 4) and not larger.question.colocated
    for found, alone in ((shared, False), (apart, True)):
        owners = {name.partition(" ")[0] for name in found.rows[0].candidate.phases["train"]}
        assert owners == ({"learner"} if alone else {"learner", "engine"})
    with pytest.raises(UsageError, match="--gpus 4 leaves the learner none"):
        plan(path, overrides, Options(gpus=4))

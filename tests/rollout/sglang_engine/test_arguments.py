"""`rollout.sglang`, checked against an SGLang that is asked, and what becomes of it."""

from __future__ import annotations

import json
import re
import sys

import pytest
from pydantic import ValidationError

from launcher.overrides import load_config
from launcher.sources import ConfigError
from megatron_pbsd.config import RolloutConfig, RunConfig, SGLangConfig
from megatron_pbsd.models.sglang import ServerParallel, server_of
from megatron_pbsd.rollout.engines.protocol import EngineError
from megatron_pbsd.rollout.engines.sglang import arguments

DESCRIBED = {
    "tp_size": {"type": ["int"], "choices": None}, "mem_fraction_static": {"type": ["float", "null"], "choices": None},
    "dtype": {"type": ["str"], "choices": ["auto", "bfloat16", "float32"]}, "odd": {"type": [], "choices": None},
    "enable_mixed_chunk": {"type": ["bool"], "choices": None},
    "cuda_graph_bs": {"type": ["list", "null"], "choices": None},
}
MINIMAL = {"name": "n", "steps": 1, "model": {"path": "m"}}


@pytest.mark.parametrize(("name", "value", "message"), [
    ("tp_sise", 2, "args.tp_sise is not an argument of the SGLang that is installed; did you mean 'tp_size'?"),
    ("--tp-size", 2, "did you mean 'tp_size'?"),
    ("tp_size", "2", "args.tp_size = '2' is str, expected int"),
    ("tp_size", True, "args.tp_size = True is bool, expected int"),
    ("mem_fraction_static", "all", "is str, expected float or null"),
    ("dtype", "float23", "args.dtype = 'float23' is not one of auto, bfloat16, float32; did you mean 'float32'?"),
])
def test_a_wrong_argument_is_named(name, value, message):
    (problem,) = arguments.argument_problems(name, value, DESCRIBED)
    assert message in problem and problem.startswith("rollout.sglang.args.")


@pytest.mark.parametrize(("name", "value"), [
    ("tp_size", 2), ("mem_fraction_static", 1), ("mem_fraction_static", None), ("dtype", "float32"), ("odd", {"a": 1}),
    ("enable_mixed_chunk", True), ("cuda_graph_bs", [1, 2])])
def test_a_right_argument_is_none(name, value):
    assert arguments.argument_problems(name, value, DESCRIBED) == []


def test_all_problems_at_once(tmp_path):
    """Those of what the project sets itself do not need SGLang."""
    section = SGLangConfig(python=str(tmp_path / "absent"), args={"port": 1, "model_path": "x", "dp_size": 2})
    assert "args.node_rank is set by the engine's machines" in arguments.problems(
        SGLangConfig(args={"node_rank": 1}))[0]
    first, second, third, fourth = arguments.problems(section)
    assert "args.port is set by rollout.sglang.port" in first and "args.model_path is set by model.path" in second
    assert "args.dp_size = 2" in third and "raise rollout.engines" in third and "attn_dp_size" in third
    assert "rollout.sglang.python" in fourth and "is no interpreter" in fourth


@pytest.mark.parametrize("args", [
    {"tp_size": 4, "attn_dp_size": 4}, {"tp_size": 4, "dp_size": 4, "enable_dp_attention": True},
    {"tp_size": 4, "dp_size": 1, "attn_dp_size": 4, "enable_dp_attention": True}])
def test_replicas_of_attention_by_either_name(args):
    """Each has the same number of slots."""
    config = RolloutConfig(engine="sglang", slots=10, sglang={"args": args})
    made = arguments.server_arguments(config, "/m", number=1, load_weights=True, routed_experts=False)
    assert server_of(made) == ServerParallel(tp=4, dp_attention=4) and made["base_gpu_id"] == 4
    assert made["max_running_requests"] == 12 and args.items() <= made.items()
    assert arguments.problems(config.sglang) == []


def test_an_environment_without_sglang_is_named():
    with pytest.raises(EngineError, match=r"python.*cannot be asked.*[\s\S]*sglang"):
        arguments.installed(SGLangConfig(python=sys.executable))


def test_sglang_is_asked_once(tmp_path, monkeypatch):
    """An interpreter in which SGLang is a stand-in that says what it is asked."""
    package = tmp_path / "packages" / "sglang"
    for folder in (package / "srt" / "arg_groups", package.parent / "sglang-9.dist-info"):
        folder.mkdir(parents=True)
    (package.parent / "sglang-9.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: sglang\nVersion: 9\n")
    (package / "srt" / "server_args.py").write_text(
        "import dataclasses, typing\n"
        "print('asked')\n"
        f"open({str(tmp_path / 'asked')!r}, 'a').write('x')\n"
        "@dataclasses.dataclass\n"
        "class Arg:\n    choices: list = None\n"
        "@dataclasses.dataclass\n"
        "class ServerArgs:\n"
        "    tp_size: typing.Annotated[int, Arg()] = 1\n"
        "    dtype: typing.Annotated[typing.Optional[str], Arg(['auto', 'float32'])] = None\n"
        "    mode: typing.Literal['a', 'b'] = 'a'\n"
        "    graph: typing.Optional[Arg] = None\n")
    (package / "srt" / "arg_groups" / "arg_utils.py").write_text("from dataclasses import fields as record_fields\n")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    section = SGLangConfig(python=sys.executable, environment={"PYTHONPATH": str(package.parent)})
    described = arguments.installed(section)
    assert described == arguments.installed(section) == {
        "tp_size": {"type": ["int"], "choices": None},
        "dtype": {"type": ["null", "str"], "choices": ["auto", "float32"]},
        "mode": {"type": ["str"], "choices": ["a", "b"]}, "graph": {"type": [], "choices": None}}
    assert (tmp_path / "asked").read_text() == "x"


def test_arguments_of_a_server():
    config = RolloutConfig(engine="sglang", slots=32, max_context=500,
                           sglang={"python": "p", "args": {"tp_size": 2, "dtype": "bfloat16"}})
    made = arguments.server_arguments(config, "/m", number=3, load_weights=False, routed_experts=True)
    assert {"tp_size": 2, "dtype": "bfloat16", "model_path": "/m", "max_running_requests": 32, "load_format": "dummy",
            "base_gpu_id": 6, "enable_return_routed_experts": True}.items() <= made.items()
    assert made["context_length"] > 500 and json.dumps(made)
    assert arguments.ranks(config.sglang) == 2


@pytest.mark.parametrize(("section", "message"), [
    ({"engine": "sglang"}, "needs rollout.sglang.python"),
    ({"engine": "sglang", "sglang": {"python": "p", "args": {"speculative_algorithm": "NGRAM", "device": "cpu"}}},
     "speculative_algorithm = 'NGRAM': on CPUs .* the likeliest token at any temperature"),
    ({"sglang": {"args": {"tp_size": 2}}}, "rollout.sglang.args has no effect with rollout.engine = 'embedded'"),
    ({"engine": "sglang", "sglang": {"python": "p", "args": {"tp_size": 4, "nnodes": 3}}},
     r"nnodes = 3 machines cannot have equal parts of tp_size \* pp_size = 4 \* 1; valid: 1, 2, 4; the nearest is 2"),
    ({"engine": "sglang", "sglang": {"python": "p", "args": {"tp_size": 4, "nnodes": "2"}}}, "nnodes = '2' machines"),
    ({"engine": "sglang", "engines": 8, "sglang": {"python": "p", "port": 65530}}, "the nearest valid value is 65528"),
])
def test_conflicts(section, message):
    with pytest.raises(ValidationError, match=message):
        RunConfig.model_validate({**MINIMAL, "rollout": section})


@pytest.mark.parametrize(("args", "message"), [
    ({"tp_size": 16}, None), ({"tp_size": 4}, None), ({"tp_size": 8, "nnodes": 2}, None),
    ({"tp_size": 12}, "= 12 does not fill nodes of cluster.gpus_per_node = 8; the nearest valid values are 8 and 16"),
    ({"tp_size": 8, "nnodes": 8}, "nnodes = 8 exceeds cluster.nodes = 4; it may be at most 4"),
    ({"tp_size": 16, "nnodes": 1}, "leaves 16 GPUs of a server to a node of .* = 8; the nearest valid value is 2")])
def test_servers_on_the_nodes_of_a_cluster(args, message):
    config = {**MINIMAL, "cluster": {"nodes": 4, "gpus_per_node": 8}, "learner": {"release_memory": True},
              "rollout": {"engine": "sglang", "engines": 1, "sleep": "all", "sglang": {"python": "p", "args": args}}}
    if message is None:
        assert RunConfig.model_validate(config)
    else:
        with pytest.raises(ValidationError, match=message):
            RunConfig.model_validate(config)


DRAFTING = {"engine": "sglang", "speculation": {"enabled": True, "max_draft_tokens": 5}, "sglang": {"python": "p"}}


def test_drafting():
    config = RunConfig.model_validate({**MINIMAL, "rollout": DRAFTING}).rollout
    made = arguments.server_arguments(config, "/m", number=0, load_weights=True, routed_experts=False)
    assert arguments.DRAFTING.items() <= made.items() and made["speculative_num_draft_tokens"] == 6
    plain = RolloutConfig(engine="sglang", sglang={"python": "p", "args": {"speculative_algorithm": "EAGLE"}})
    made = arguments.server_arguments(plain, "/m", number=0, load_weights=True, routed_experts=False)
    assert made["speculative_algorithm"] == "EAGLE" and not arguments.DRAFTING.items() <= made.items()
    assert not plain.conflicts()


def test_all_that_does_not_go_with_drafts_is_named_at_once():
    args = {"speculative_algorithm": "EAGLE", "speculative_num_steps": 3, "pp_size": 2, "enable_dp_attention": True,
            "attn_dp_size": 2, "disable_overlap_schedule": False, "page_size": 64}
    with pytest.raises(ValidationError) as caught:
        RunConfig.model_validate({**MINIMAL, "rollout": DRAFTING | {
            "speculation": {"enabled": True, "paths": 2}, "sglang": {"python": "p", "args": args}}})
    message = str(caught.value)
    assert "rollout.speculation.paths = 2 has no effect with rollout.engine = 'sglang'" in message
    assert all(f"rollout.sglang.args.{name}" in message for name in args)
    assert "pp_size = 2 cannot be had" in message and "the only valid value is 1" in message
    fitting = {"pp_size": 1, "disable_overlap_schedule": True, "page_size": 64, "attention_backend": "flashinfer"}
    RunConfig.model_validate({**MINIMAL, "rollout": DRAFTING | {"sglang": {"python": "p", "args": fitting}}})


def test_numba_compiles_for_each_environment_by_itself():
    here, there = (arguments.server_environment(SGLangConfig(python=python))["NUMBA_CACHE_DIR"] for python in "ab")
    assert here != there
    own = SGLangConfig(python="a", environment={"NUMBA_CACHE_DIR": "/mine"})
    assert arguments.server_environment(own)["NUMBA_CACHE_DIR"] == "/mine"


def test_a_configuration_that_was_written_is_read_again():
    config = RunConfig.model_validate(MINIMAL)
    assert RunConfig.model_validate(config.model_dump()) == config


def test_arguments_come_from_the_command_line_too():
    given = ("--rollout.engine", "sglang", "--rollout.sglang.python", "p", "--rollout.sglang.args.tp_size", "2")
    assert load_config("configs/quickstart.yaml", given, check_model=False).rollout.sglang.args == {"tp_size": 2}
    with pytest.raises(ConfigError, match=r"args = 3[\s\S]*keys are text and whose values are anything"):
        load_config("configs/quickstart.yaml", (*given[:4], "--rollout.sglang.args", "3"), check_model=False)


def test_memory_is_saved_where_engines_are_to_sleep():
    for sleep, device, expected in (("none", "cuda", False), ("all", "cuda", True), ("kv_cache", "cpu", None)):
        config = RolloutConfig(engine="sglang", sleep=sleep, sglang={"python": "python", "args": {"device": device}})
        made = arguments.server_arguments(config, "m", number=0, load_weights=True, routed_experts=False)
        assert made.get("enable_memory_saver") is expected
    (problem,) = arguments.problems(SGLangConfig(args={"enable_memory_saver": True}))
    assert problem == "rollout.sglang.args.enable_memory_saver is set by rollout.sleep: leave it out"


def test_weights_of_a_draft_model_do_not_sleep():
    sglang = {"python": "python", "args": {"speculative_draft_model_path": "draft"}}
    message = "rollout.sleep = 'all' would lose the draft model 'draft'.*valid value is 'kv_cache'"
    for sleep, found in (("all", True), ("kv_cache", False)):
        problems = RolloutConfig(engine="sglang", sleep=sleep, sglang=sglang).conflicts()
        assert any(re.search(message, problem) for problem in problems) == found

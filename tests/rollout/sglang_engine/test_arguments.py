"""`rollout.sglang`, checked against an SGLang that is asked, and what becomes of it."""

from __future__ import annotations

import json
import sys

import pytest
from pydantic import ValidationError

from launcher.overrides import load_config
from launcher.sources import ConfigError
from megatron_pbsd.config import RolloutConfig, RunConfig, SGLangConfig
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
    first, second, third, fourth = arguments.problems(section)
    assert "args.port is set by rollout.sglang.port" in first and "args.model_path is set by model.path" in second
    assert "args.dp_size = 2" in third and "raise rollout.engines" in third
    assert "rollout.sglang.python" in fourth and "is no interpreter" in fourth


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
    ({"engine": "sglang", "speculation": {"enabled": True}, "sglang": {"python": "p"}},
     "rollout.speculation.enabled has no effect"),
    ({"sglang": {"args": {"tp_size": 2}}}, "rollout.sglang.args has no effect with rollout.engine = 'embedded'"),
    ({"engine": "sglang", "engines": 8, "sglang": {"python": "p", "port": 65530}}, "the nearest valid value is 65528"),
])
def test_conflicts(section, message):
    with pytest.raises(ValidationError, match=message):
        RunConfig.model_validate({**MINIMAL, "rollout": section})


def test_a_configuration_that_was_written_is_read_again():
    config = RunConfig.model_validate(MINIMAL)
    assert RunConfig.model_validate(config.model_dump()) == config


def test_arguments_come_from_the_command_line_too():
    given = ("--rollout.engine", "sglang", "--rollout.sglang.python", "p", "--rollout.sglang.args.tp_size", "2")
    assert load_config("configs/quickstart.yaml", given, check_model=False).rollout.sglang.args == {"tp_size": 2}
    with pytest.raises(ConfigError, match=r"args = 3[\s\S]*keys are text and whose values are anything"):
        load_config("configs/quickstart.yaml", (*given[:4], "--rollout.sglang.args", "3"), check_model=False)

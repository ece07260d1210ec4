from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, strategies as st

from launcher.overrides import load_config
from launcher.schema import describe, fields_at, known_keys
from launcher.sources import ConfigError
from megatron_pbsd.config import CustomLossConfig, GRPOConfig, IcePopConfig, PBSDConfig, RunConfig, SFTConfig

MINIMAL = "name: test\nsteps: 3\nmodel: {path: models/none}\n"


@pytest.fixture
def load(tmp_path):
    def load_text(text: str, *overrides: str, check_model: bool = False) -> RunConfig:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return load_config(path, overrides, check_model)
    return load_text


@pytest.fixture
def problems(load):
    """{key: whole problem as text} of a configuration that is wrong."""
    def problems_of(text: str, *overrides: str, check_model: bool = False) -> dict[str, str]:
        with pytest.raises(ConfigError) as caught:
            load(text, *overrides, check_model=check_model)
        assert all(str(problem) in str(caught.value) for problem in caught.value.problems)
        return {problem.key: str(problem) for problem in caught.value.problems}
    return problems_of


@pytest.fixture
def model_folder(tmp_path) -> Path:
    from transformers import Qwen3Config

    folder = tmp_path / "models" / "base"
    Qwen3Config(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
                num_key_value_heads=2, head_dim=16, tie_word_embeddings=True).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    return folder


def test_overrides_win_over_the_file_in_both_spellings(load):
    config = load(MINIMAL + "rollout: {slots: 8, group_size: 4}\n", "--rollout.slots", "32",
                  "--algorithm.loss.entropy_coefficient=-0.5", "--environment.hops", "[1, 2]", "--steps", "7",
                  "--learner.optimizer.lr", "3e-4", "--ray_port", "null")
    assert (config.rollout.slots, config.rollout.group_size, config.steps) == (32, 4, 7)
    assert config.algorithm.loss.entropy_coefficient == -0.5
    assert config.environment.hops == (1, 2)
    assert config.learner.optimizer.lr == 3e-4


def test_text_fields_take_overrides_as_they_are(load):
    config = load(MINIMAL, "--name", "2026", "--model.path", "no")
    assert (config.name, config.model.path) == ("2026", "no")


def test_resolved_configuration_reads_back_as_itself(load):
    config = load(MINIMAL, "--algorithm.name", "grpo", "--rollout.temperature", "0.7")
    assert load(yaml.safe_dump(config.model_dump(mode="json"))) == config


def test_another_algorithm_drops_the_keys_of_the_files_own(load, problems):
    text = MINIMAL + "algorithm: {name: pbsd, epsilon: 0.3, normalise_std: false, loss: {clip_high: 0.4}}\n"
    config = load(text, "--algorithm.name", "grpo")
    assert config.algorithm == GRPOConfig(normalise_std=False, loss=config.algorithm.loss)
    assert config.algorithm.loss.clip_high == 0.4
    assert isinstance(load(MINIMAL, "--algorithm.epsilon", "0.2").algorithm, PBSDConfig)
    found = problems(text, "--algorithm.name", "grpo", "--algorithm.epsilon", "0.1")
    assert "is a key of 'pbsd', not of 'grpo'" in found["algorithm.epsilon"]
    assert load(text, "--algorithm.name", "sft").algorithm == SFTConfig()
    text = MINIMAL + "algorithm: {loss: {name: custom, file: a.py}}\n"
    assert load(text, "--algorithm.name", "sft").algorithm.loss == CustomLossConfig(file="a.py")


def test_sections_inside_sections_have_default_variants_too(load, problems):
    text = MINIMAL + "algorithm: {loss: {ratio: sequence, mismatch: {cap: 3}}}\n"
    loss = load(text).algorithm.loss
    assert (loss.clip_low, loss.clip_high, loss.mismatch.cap) == (3e-4, 4e-4, 3)
    loss = load(text, "--algorithm.loss.mismatch.name", "icepop", "--algorithm.loss.mismatch.low=0.1").algorithm.loss
    assert loss.mismatch == IcePopConfig(low=0.1)
    assert load(yaml.safe_dump(load(text).model_dump(mode="json"))) == load(text)
    found = problems(text, "--algorithm.loss.mismatch.low=0.1", "--algorithm.loss.clip_hi", "3")
    assert "'icepop'" in found["algorithm.loss.mismatch.low"]
    assert "did you mean 'clip_high'" in found["algorithm.loss.clip_hi"]
    found = problems(text, "--algorithm.loss.objective", "cispo", "--algorithm.loss.dual_clip", "3")
    assert "has no effect with objective = 'cispo'" in found["algorithm.loss"]
    found = problems(text, "--algorithm.loss.name", "costom")
    assert "did you mean 'custom'" in found["algorithm.loss"]


def test_every_problem_is_reported_at_once(problems):
    found = problems(
        "name: two words\nsteps: 0\nruntime: inlin\nmodle: {path: x}\nlr: 3e-4\n"
        "learner:\n  optimizer: {lr: -1, lrr: 2}\n  updates_per_step: 99\n"
        "rollout: {group_size: 1.5, temperatur: 1}\nenvironment: {hops: [1, 5]}\nevaluation: 3\n",
        "--algorithm.name", "gropo", "--checkpoint.keep", "--stps=4")
    assert set(found) == {
        "name", "steps", "runtime", "modle", "model", "lr", "learner.optimizer.lr", "learner.optimizer.lrr",
        "learner.updates_per_step", "rollout.group_size", "rollout.temperatur", "environment.hops", "evaluation",
        "algorithm", "checkpoint.keep", "stps"}
    for key, words in {
        "steps": ("steps = 0", "run.yaml:2", ">= 1", "nearest valid value is 1"),
        "runtime": ("'ray', 'inline'", "did you mean 'inline'"),
        "modle": ("did you mean 'model'",),
        "lr": ("did you mean 'learner.optimizer.lr'",),
        "learner.optimizer.lr": ("= -1", "run.yaml:7", "> 0"),
        "learner.optimizer.lrr": ("did you mean 'lr'",),
        "learner.updates_per_step": ("exceeds rollout.prompts_per_step = 16",),
        "rollout.group_size": ("nearest valid value is 2",),
        "environment.hops": ("element 2", "<= 3"),
        "evaluation": ("a section with the keys every",),
        "algorithm": ("algorithm.name = \"gropo\"", "command line", "did you mean 'grpo'"),
        "checkpoint.keep": ("needs a value",),
        "stps": ("did you mean 'steps'",),
    }.items():
        for word in words:
            assert word in found[key], (key, word, found[key])


def test_mappings_are_checked_key_by_key(load, problems):
    text = MINIMAL + "algorithm: {name: sft, bad_habits: {needless: 1, prematur: 2, gives_up: -1}}\n"
    message = problems(text)["algorithm.bad_habits"]
    assert "'needless', 'premature'" in message
    with pytest.raises(ConfigError, match="did you mean 'premature'") as caught:
        load(text)
    assert "key 'gives_up'); the nearest valid value is 0" in str(caught.value)
    assert load(MINIMAL, "--algorithm.name", "sft", "--algorithm.bad_habits.needless", "3").algorithm.bad_habits == {
        "needless": 3.0}


def test_a_conflict_about_a_wrong_value_is_not_guessed(problems):
    found = problems(MINIMAL + "runtime: inline\nlearner: {parallel: {world_size: two}}\n")
    assert set(found) == {"learner.parallel.world_size"}


def test_conflict_of_sections_names_key_value_and_line(problems):
    found = problems(MINIMAL + "runtime: inline\n")
    assert "learner.parallel.world_size = 2" in found["learner.parallel.world_size"]
    found = problems(MINIMAL, "--learner.parallel.world_size", "3")
    assert "tp * pp * cp may be one of [1, 3]" in found["learner.parallel"]


def test_duplicate_keys_are_named_with_both_lines(problems):
    found = problems("name: a\nsteps: 1\nmodel: {path: x}\nrollout:\n  slots: 1\n  slots: 2\nname: b\n")
    assert "run.yaml:6" in found["rollout.slots"] and "run.yaml:5" in found["rollout.slots"]
    assert "run.yaml:7" in found["name"] and "run.yaml:1" in found["name"]


@pytest.mark.parametrize(("text", "words"), [
    ("a: [1", "not valid YAML"), ("- 1\n- 2\n", "expected a mapping"), ("3", "expected a mapping"),
    ("a: b: c", "not valid YAML"),
])
def test_unreadable_text(load, text, words):
    with pytest.raises(ConfigError, match=words):
        load(text)


def test_unreadable_files(tmp_path):
    (tmp_path / "quickstart.yaml").write_text(MINIMAL)
    with pytest.raises(ConfigError, match="no such file; in .* there are: quickstart.yaml"):
        load_config(tmp_path / "quickstrat.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "binary.yaml")


def test_empty_file_asks_for_what_is_required(problems):
    assert set(problems("")) == {"name", "steps", "model"}


@pytest.mark.parametrize("text", ["lr: .nan", "lr: .inf", "lr: 1e999"])
def test_numbers_must_be_finite(problems, text):
    assert "finite" in problems(MINIMAL + "learner: {optimizer: {" + text + "}}")["learner.optimizer.lr"]


def test_missing_model_folder_is_reported_with_the_rest(problems, model_folder):
    found = problems(f"name: a\nsteps: none\nmodel: {{path: {model_folder}s}}\n", check_model=True)
    assert set(found) == {"steps", "model.path"}
    assert "no such folder" in found["model.path"] and "did you mean 'base'" in found["model.path"]


def test_model_folder_is_looked_into(load, problems, model_folder):
    text = f"name: a\nsteps: 1\nmodel: {{path: {model_folder}}}\n"
    assert load(text, check_model=True).model.path == str(model_folder)
    (model_folder / "model.safetensors").unlink()
    assert "model.safetensors" in problems(text, check_model=True)["model.path"]
    load(text, "--model.initial_weights", "random", check_model=True)
    (model_folder / "config.json").write_text("{")
    assert "config.json cannot be read" in problems(text, check_model=True)["model.path"]
    (model_folder / "config.json").write_text(json.dumps({"model_type": "qwen4"}))
    assert "qwen4" in problems(text, check_model=True)["model.path"]
    (model_folder / "config.json").unlink()
    assert "no config.json" in problems(text, check_model=True)["model.path"]


def test_a_shape_stands_for_a_model_that_is_elsewhere(load, problems, model_folder, tmp_path):
    shape = tmp_path / "shape.json"
    shape.write_bytes((model_folder / "config.json").read_bytes())
    text = f"name: a\nsteps: 1\nmodel: {{path: {model_folder}s, shape: {shape}}}\n"
    assert load(text, check_model=True).model.shape == str(shape)
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError, match="model.path = .*\n +no such folder"):
        load_config(tmp_path / "run.yaml", to_run=True)
    assert "num_key_value_heads" in problems(
        text, "--learner.parallel.tp", "4", "--learner.parallel.world_size", "4", check_model=True)[
        "learner.parallel.tp"]
    shape.write_text(json.dumps({"model_type": "qwen4"}))
    assert "qwen4" in problems(text, check_model=True)["model.shape"]
    shape.write_text("[]")
    assert "is not a JSON object" in problems(text, check_model=True)["model.shape"]
    shape.unlink()
    assert "No such file" in problems(text, check_model=True)["model.shape"]


def test_a_shape_is_that_of_the_model_where_both_are_there(load, problems, model_folder, tmp_path):
    shape = tmp_path / "shape.json"
    hf = json.loads((model_folder / "config.json").read_text())
    text = f"name: a\nsteps: 1\nmodel: {{path: {model_folder}, shape: {shape}}}\n"
    shape.write_text(json.dumps(hf | {"use_cache": False}))
    load(text, check_model=True)
    layers = {"num_hidden_layers": 6, "layer_types": ["full_attention"] * 6}
    shape.write_text(json.dumps(hf | layers | {"hidden_size": 32}))
    found = problems(text, check_model=True)
    assert set(found) == {"model.shape"}
    assert "hidden_size = 32, and 64 in the folder; num_hidden_layers = 6, and 4 in the folder" in found["model.shape"]


def test_servers_that_the_model_cannot_have(problems, model_folder):
    text = (f"name: a\nsteps: 1\nmodel: {{path: {model_folder}}}\n"
            "rollout: {engine: sglang, sglang: {python: python, args: {tp_size: 8}}}\n")
    found = problems(text, check_model=True)["rollout.sglang.args.tp_size"]
    assert "does not divide num_attention_heads = 4" in found and "run.yaml:4" in found
    # A section that is wrong already is not looked into.
    assert set(problems(text, "--rollout.slots", "none", check_model=True)) == {"rollout.slots"}


def test_more_gpus_than_the_cluster_has(load, problems):
    """With engines on the learner's GPUs, or besides these."""
    text = (MINIMAL + "cluster: {nodes: 2, gpus_per_node: 8}\nlearner: {parallel: {world_size: 8}}\n"
            "rollout: {engine: sglang, engines: 3, sglang: {python: python, args: {tp_size: 4}}}\n")
    assert "exceeds cluster.nodes * cluster.gpus_per_node = 1 * 4 = 4; it may be at most 4" in problems(
        text, "--cluster.nodes", "1", "--cluster.gpus_per_node", "4")["learner.parallel.world_size"]
    found = problems(text)["rollout.engines"]
    assert "need 12 GPUs" in found and "there are 8 for them" in found and "the nearest valid value is 2" in found
    assert "there are 0 for them besides the learner's" in problems(
        text, "--learner.parallel.world_size", "16")["rollout.engines"]
    load(text, "--learner.release_memory", "true")
    load(text, "--cluster.gpus_per_node", "0")
    assert "there are 16 for them; the nearest" in problems(
        text, "--learner.release_memory", "true", "--rollout.engines", "5")["rollout.engines"]


def test_layout_that_the_model_cannot_have(problems, model_folder):
    found = problems(f"name: a\nsteps: none\nmodel: {{path: {model_folder}}}\n", "--learner.parallel.tp", "4",
                     "--learner.parallel.world_size", "4", check_model=True)
    assert set(found) == {"steps", "learner.parallel.tp"}
    assert "num_key_value_heads" in found["learner.parallel.tp"] and "command line" in found["learner.parallel.tp"]


def test_every_key_says_what_it_is():
    for path in known_keys():
        for field in fields_at(path):
            assert field.description or path[-1] == "loss", f"{'.'.join(path)} has no docstring"
            assert describe(field.annotation, field.metadata)


@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(sorted({key for path in known_keys() for key in path})), inner, max_size=5), max_leaves=20))
def test_any_values_give_a_configuration_or_its_problems(values):
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "any.yaml")
        path.write_text(json.dumps({"name": "a", "steps": 1, "model": {"path": "x"}} | (
            values if isinstance(values, dict) else {"learner": values})))
        try:
            load_config(path, check_model=False)
        except ConfigError as error:
            assert error.problems


def test_reading_a_configuration_imports_nothing_heavy():
    script = ("import sys, launcher.cli, launcher.overrides\n"
              "print(*{'torch', 'ray', 'transformers', 'megatron', 'numpy'} & set(sys.modules))")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []

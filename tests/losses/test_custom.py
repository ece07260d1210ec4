"""A user's own loss: found in its file, given what it declares, checked, and read again in another process."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from loss_inputs import EXAMPLE, gradients, make_inputs

from megatron_pbsd import losses
from megatron_pbsd.config import CustomLossConfig, PBSDConfig
from megatron_pbsd.losses import Constant, LossError, LossOutput, register_loss

HEAD = ("from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "from megatron_pbsd.losses import Constant, LossOutput, register_loss\n")


@pytest.fixture
def build(tmp_path):
    """Text of a file, and the configuration's other keys → the loss."""
    def build_text(text: str, **keys) -> losses.Loss:
        (tmp_path / "mine.py").write_text(HEAD + text)
        return losses.build(CustomLossConfig(file=str(tmp_path / "mine.py"), **keys))
    return build_text


def registered(body: str, name: str = "mine", **declared) -> str:
    arguments = ", ".join(f"{key}={value!r}" for key, value in declared.items())
    return f"@register_loss({name!r}, {arguments})\ndef {name}(inputs, options):\n    {body}\n"


def test_the_example_is_what_its_docstring_says():
    loss = losses.build(CustomLossConfig(file=EXAMPLE, options={"discount": 0.5}))
    assert (loss.name, loss.fields, loss.reduction) == ("early_turns", ("advantages", "turn_index"), "trajectory")
    x = make_inputs()
    output = loss.function(x)
    expected = sum(-w * 0.5 ** int(k) * a * p for w, k, a, p in zip(
        x.weights, x["turn_index"], x["advantages"], x.log_probs, strict=True))
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(gradients(output.loss, x)[0], gradients(expected, x)[0])


def test_another_process_reads_the_file_itself(build, tmp_path):
    """Nothing but the place, the name and the options travel; dataclasses in the file work as in any module."""
    loss = build("@dataclass\nclass Scale:\n    by: float\n"
                 + registered("return LossOutput((Scale(options['by']).by * inputs.log_probs).sum())"),
                 options={"by": 3})
    (tmp_path / "loss.pkl").write_bytes(pickle.dumps(loss))
    code = ("import pickle, sys; sys.path.append('tests'); from loss_inputs import make_inputs; "
            f"loss = pickle.load(open({str(tmp_path / 'loss.pkl')!r}, 'rb')); "
            "print(loss.name, float(loss.function(make_inputs()).loss.detach()))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    name, value = done.stdout.split()
    assert name == "mine" and float(value) == pytest.approx(3 * float(make_inputs().log_probs.detach().sum()))


def test_a_relative_file_is_found_from_anywhere(monkeypatch, tmp_path):
    sent = pickle.dumps(losses.build(CustomLossConfig(file=EXAMPLE)))
    monkeypatch.chdir(tmp_path)
    assert pickle.loads(sent).name == "early_turns"


def test_declarations_reach_the_learner(build):
    loss = build(registered("return LossOutput(inputs.log_probs.sum())", fields=("reward", "routed_experts"),
                            outputs=("values", "candidates"), reduction="turn"))
    assert loss.fields == ("reward", "routed_experts", "teacher_top_tokens")
    assert (loss.outputs, loss.reduction) == (("values", "candidates"), "turn")
    with pytest.raises(LossError, match="needs loss.reduction_constant"):
        build(registered("return None", reduction="constant"))
    assert build(registered("return None", reduction=Constant(5))).reduction == Constant(5)


def test_it_may_be_given_pbsd_credit():
    loss = losses.build(PBSDConfig(loss=CustomLossConfig(file=EXAMPLE)), on_policy=True)
    assert set(loss.fields) == {"advantages", "turn_index", "teacher_log_probs", "answer_mask"}


@pytest.mark.parametrize(("declared", "words"), [
    ({"fields": ("advantage",)}, "unknown batch field 'advantage'; did you mean 'advantages'"),
    ({"fields": ("xyz",)}, "unknown batch field 'xyz'; there are: 'tokens', 'loss_mask'"),
    ({"fields": "advantages"}, "sequences of names"),
    ({"outputs": ("value",)}, "unknown output 'value'; did you mean 'values'"),
    ({"reduction": "sequence"}, "unknown reduction 'sequence'; there are: 'token', 'turn'"),
])
def test_wrong_declarations(declared, words, build):
    with pytest.raises(LossError, match=words):
        register_loss("mine", **declared)
    with pytest.raises(LossError, match=words):
        build(registered("return None", **declared))


@pytest.mark.parametrize(("text", "keys", "words"), [
    ("", {}, "registers no loss: decorate"),
    (registered("return None", "one"), {"function": "two"}, "registers no loss 'two'; there are: 'one'"),
    (registered("return None", "one") + registered("return None", "two"), {}, "'one', 'two': select one by"),
    (registered("return None", "a").replace("def a", "def b") + registered("return None", "a"), {}, "two losses 'a'"),
    ("import nothing_of_this_name\n", {}, "does not run: ModuleNotFoundError"),
    ("1 +\n", {}, "does not run: SyntaxError"),
])
def test_wrong_files(text, keys, words, build):
    with pytest.raises(LossError, match=words):
        build(text, **keys)


def test_no_such_file(tmp_path):
    with pytest.raises(LossError, match="no file .*early_turn_loss.py; did you mean 'early_turns_loss.py'"):
        losses.build(CustomLossConfig(file=EXAMPLE.replace("turns", "turn")))
    (tmp_path / "loss.txt").write_text("")
    with pytest.raises(LossError, match="must end in .py"):
        losses.build(CustomLossConfig(file=str(tmp_path / "loss.txt")))
    with pytest.raises(LossError, match="no file"):
        losses.build(CustomLossConfig(file=str(tmp_path / "none" / "loss.py")))


@pytest.mark.parametrize(("body", "words"), [
    ("return inputs.log_probs.sum()", "returned Tensor, expected a LossOutput"),
    ("return None", "returned NoneType"),
    ("return LossOutput(inputs.log_probs)", r"shape \(25,\), expected one number"),
    ("return LossOutput(inputs.log_probs.detach().sum())", "without gradient"),
    ("return LossOutput((inputs['reward'] * inputs.log_probs).sum())",
     "reads the field 'reward', which it does not declare; it declares 'advantages'"),
])
def test_wrong_results(body, words, build):
    loss = build(registered(body, fields=("advantages",)))
    x = make_inputs()
    with pytest.raises(LossError, match=words):
        loss.function(type(x)(x.log_probs, x.entropy, x.weights, x.sequence, x.sequences,
                              {name: x[name] for name in loss.fields}))


def test_options_are_the_functions_own_copy(build):
    loss = build(registered("options['n'] += 1; return LossOutput(options['n'] * inputs.log_probs.sum())"),
                 options={"n": 1})
    x = make_inputs()
    first, second = loss.function(x), loss.function(x)
    assert isinstance(first, LossOutput) and float(first.loss.detach()) == float(second.loss.detach())

from __future__ import annotations

import json
import sys
from types import ModuleType

import pytest
from synthetic_run import write_run

from launcher.bench import load_bench
from launcher.cli import main, split_overrides
from megatron_pbsd.errors import PbsdError, UsageError


class EngineDown(PbsdError):
    component = "engine"


@pytest.fixture
def config_file(tmp_path, monkeypatch):
    """A valid configuration whose model check is left out: these tests train nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("launcher.overrides._model_problems", lambda *_: [])
    (tmp_path / "run.yaml").write_text("name: test\nsteps: 3\nmodel: {path: models/none}\n")
    return "run.yaml"


@pytest.fixture
def train_with(monkeypatch):
    """Put a function in place of megatron_pbsd.train.main."""
    def install(function):
        module = ModuleType("megatron_pbsd.train")
        module.main = function
        monkeypatch.setitem(sys.modules, "megatron_pbsd.train", module)
    return install


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs"), steps=6)


def test_overrides_are_told_from_the_command_line():
    assert split_overrides(["train", "--steps", "3", "run.yaml", "--resume", "--a.b=-1", "--c", "-2"]) == (
        ["train", "run.yaml", "--resume=latest"], ["--steps", "3", "--a.b=-1", "--c", "-2"])
    assert split_overrides(["bench", "quickstart", "--json", "--steps", "3"]) == (
        ["bench", "quickstart", "--json"], ["--steps", "3"])
    assert split_overrides(["report", "runs/x", "--steps", "3"])[1] == []


def test_train_hands_over_the_resolved_configuration(config_file, train_with, tmp_path):
    calls = []
    train_with(lambda config, resume, *_: calls.append((config, resume)) or config.steps)
    assert main(["train", config_file, "--steps", "5", "--resume", "--rollout.slots=9"]) == 0
    (config, resume), = calls
    assert (config.steps, config.rollout.slots, resume) == (5, 9, "latest")


@pytest.mark.parametrize(("arguments", "chosen"), [
    (["run.yaml"], None), (["run.yaml", "--resume"], "latest"), (["--resume", "run.yaml"], "latest"),
    (["run.yaml", "--resume", "step_40"], "step_40"), (["--resume", "40", "run.yaml"], "step_40"),
    (["run.yaml", "--resume=best"], "best"), (["run.yaml", "--resume", "--steps", "4"], "latest"),
    (["run.yaml", "--resume", "stpe_40"], "stpe_40"),
])
def test_a_checkpoint_to_resume_from_may_follow(config_file, train_with, arguments, chosen):
    calls = []
    train_with(lambda config, resume, *_: calls.append(resume) or config.steps)
    assert main(["train", *arguments]) == 0
    assert calls == [chosen]


def test_wrong_configuration_is_exit_2_with_one_message(config_file, capsys):
    assert main(["train", config_file, "--stps", "5", "--rollout.slots", "many"]) == 2
    output = capsys.readouterr()
    assert "did you mean 'steps'" in output.err and "rollout.slots" in output.err
    assert "Traceback" not in output.err and not output.out


def test_failed_run_is_exit_1_and_keeps_the_traceback(config_file, train_with, tmp_path, capsys):
    def fail(config, *_):
        raise EngineDown("engine 1 did not answer for 300 s")
    train_with(fail)
    assert main(["train", config_file]) == 1
    error = capsys.readouterr().err
    assert error.startswith("pbsd: engine: engine 1 did not answer for 300 s") and "Traceback" not in error
    assert "EngineDown" in (tmp_path / "runs/test/error.log").read_text()


def test_bug_is_exit_1_too(config_file, train_with, tmp_path, capsys):
    train_with(lambda *_: 1 / 0)
    assert main(["train", config_file]) == 1
    assert "run: ZeroDivisionError: division by zero" in capsys.readouterr().err
    assert "ZeroDivisionError" in (tmp_path / "runs/test/error.log").read_text()


def test_usage_error_of_the_run_is_exit_2(config_file, train_with, capsys):
    def refuse(config, *_):
        raise UsageError("nothing to resume")
    train_with(refuse)
    assert main(["train", config_file, "--resume"]) == 2
    assert capsys.readouterr().err == "pbsd: nothing to resume\n"


def test_interrupt_is_exit_130_in_one_line(config_file, train_with, capsys):
    def interrupt(config, *_):
        raise KeyboardInterrupt
    train_with(interrupt)
    assert main(["train", config_file]) == 130
    assert capsys.readouterr().err == "pbsd: interrupted; continue with: pbsd train run.yaml --resume\n"


def test_a_run_is_not_started_over_another(config_file, train_with, tmp_path, capsys):
    train_with(lambda config, *_: config.steps)
    metrics = tmp_path / "runs/test/metrics.jsonl"
    metrics.parent.mkdir(parents=True)
    metrics.write_text("")
    assert main(["train", config_file]) == 0, "a run that failed before its first row may start again"
    metrics.write_text('{"step": 0}\n')
    assert main(["train", config_file]) == 2
    assert "--resume" in capsys.readouterr().err
    assert main(["train", config_file, "--resume"]) == 0
    assert main(["train", config_file, "--name", "other"]) == 0


def test_config_commands(config_file, capsys):
    assert main(["config", "check", config_file]) == 0
    assert capsys.readouterr().out == "run.yaml: valid\n"
    assert main(["config", "show", config_file, "--rollout.group_size", "4"]) == 0
    shown = capsys.readouterr().out
    assert "group_size: 4" in shown and "trajectories per step                  64" in shown
    assert main(["config", "show", config_file, "--algorithm.name", "sft"]) == 0
    assert "demonstrations in the run" in capsys.readouterr().out
    assert main(["config", "schema"]) == 0
    assert json.loads(capsys.readouterr().out)["properties"]["rollout"]


@pytest.mark.parametrize(("line", "words"), [
    (["trian"], "did you mean 'train'"), (["config", "chek"], "did you mean 'check'"), (["train"], "CONFIG"),
    (["report", "x", "--steps", "3"], "unrecognized"), ([], "COMMAND"),
])
def test_wrong_command_lines(line, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(line)
    assert stopped.value.code == 2 and words in capsys.readouterr().err


def test_trajectories_show_turns_with_their_credit(run, capsys):
    assert main(["trajectories", str(run), "--step", "3", "--limit", "1"]) == 0
    shown = capsys.readouterr().out
    assert "3/0/0" in shown and "1. search" in shown and "evidence" in shown and "advantage" in shown
    assert "<search> capital of France </search>" in shown


def test_trajectories_as_json_are_filtered(run, capsys):
    def rows(*options: str) -> list[dict]:
        assert main(["trajectories", str(run), "--json", *options]) == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    assert len(rows()) == 4 and len(rows("--limit", "0")) == 16
    solved, failed = rows("--limit", "0", "--solved"), rows("--limit", "0", "--failed")
    assert {r["reward"] for r in solved} == {1.0} and {r["reward"] for r in failed} == {0.0}
    assert len(solved) + len(failed) == 16
    assert {r["group_id"] for r in rows("--group", "2")} == {"5/2"}
    assert {r["group_id"] for r in rows("--group", "5/3", "--limit", "0")} == {"5/3"}


@pytest.mark.parametrize(("options", "words"), [
    (["--step", "99"], "nearest is 5"), (["--group", "77"], "no group '77'; it has 4: 5/0"),
])
def test_trajectories_that_do_not_exist(run, options, words, capsys):
    assert main(["trajectories", str(run), *options]) == 2
    assert words in capsys.readouterr().err


def test_report_command(run, capsys):
    (run / "report.html").unlink()
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html") and (run / "report.html").exists()


def test_not_a_run_names_the_runs_beside_it(run, capsys):
    assert main(["report", str(run.parent)]) == 2
    assert f"runs there: {run}" in capsys.readouterr().err


def test_benches_are_found_by_name():
    assert callable(load_bench("engine"))
    with pytest.raises(UsageError, match="did you mean 'engine'"):
        load_bench("engin")


def test_a_run_that_was_asked_to_stop_says_how_to_go_on(config_file, train_with, capsys):
    train_with(lambda config, *_: config.steps - 1)
    assert main(["train", config_file]) == 75
    assert "as asked, with a checkpoint" in capsys.readouterr().err

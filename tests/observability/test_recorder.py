from __future__ import annotations

import json
import math
import random
import time

import numpy as np
import pytest
import yaml
from synthetic_run import decode, encode, groups, run_config

from megatron_pbsd.config import RunConfig
from megatron_pbsd.errors import UsageError
from megatron_pbsd.observability.recorder import PHASES, Recorder, RecordError
from megatron_pbsd.observability.records import read_metrics, read_trajectories, recorded_steps


@pytest.fixture
def open_recorder(tmp_path):
    def open_at(first_step: int = 0, **observability: object) -> Recorder:
        config = run_config(steps=10, runs=str(tmp_path), observability={"progress": False, **observability})
        return Recorder(config.folder, config.observability, config, first_step)
    return open_at


def test_a_row_holds_metrics_and_where_the_time_went(open_recorder):
    with open_recorder() as recorder:
        for step in range(2):
            with recorder.phase("rollout"):
                time.sleep(0.02)
            with recorder.phase("evaluation"), recorder.phase("rollout"):
                time.sleep(0.01)
            recorder.log(step, {"reward/mean": np.float32(0.25), "count": 3})
            row = json.loads((recorder.folder / "metrics.jsonl").read_text().splitlines()[-1])
            assert row["step"] == step and row["reward/mean"] == 0.25 and row["count"] == 3
            assert all(f"time/{phase}_s" in row for phase in PHASES)
            assert 0.02 <= row["time/rollout_s"] < 0.03 + row["time/evaluation_s"]
            assert row["time/evaluation_s"] >= 0.01 and row["time/train_s"] == 0
            parts = sum(row[f"time/{name}_s"] for name in (*PHASES, "other"))
            assert math.isclose(parts, row["time/step_s"], abs_tol=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf, np.float32("nan")])
def test_numbers_must_be_finite(open_recorder, value):
    recorder = open_recorder()
    with pytest.raises(RecordError, match="'loss/total' of step 0.*finite"):
        recorder.log(0, {"loss/total": value})
    recorder.close()
    assert read_metrics(recorder.folder) == []


@pytest.mark.parametrize(("metrics", "words"), [
    ({"a": "0.5"}, "'a' of step 0 is '0.5'"), ({"a": None}, "expected a number"), ({"step": 3}, "recorder's own"),
    ({"time/train_s": 3.0}, "recorder's own"),
])
def test_only_numbers_that_are_not_the_recorders_own(open_recorder, metrics, words):
    with open_recorder() as recorder:
        with pytest.raises(RecordError, match=words):
            recorder.log(0, metrics)
        recorder.log(0, {})


def test_steps_come_once_and_in_order(open_recorder):
    with open_recorder() as recorder:
        recorder.log(3, {})
        with pytest.raises(RecordError, match="step 3 was logged after step 3"):
            recorder.log(3, {})


def test_a_resumed_run_cuts_off_what_it_will_do_again(open_recorder):
    with open_recorder() as recorder:
        for step in range(6):
            recorder.trajectories(step, groups(step, 10, random.Random(step)), decode)
            recorder.log(step, {"reward/mean": step})
    with (recorder.folder / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 6, "rewa')  # the crash
    with open_recorder(first_step=4) as recorder:
        assert recorded_steps(recorder.folder) == [0, 1, 2, 3]
        recorder.log(4, {"reward/mean": 40})
    assert [row["reward/mean"] for row in read_metrics(recorder.folder)] == [0, 1, 2, 3, 40]


def test_damage_that_no_crash_explains_is_an_error(open_recorder):
    recorder = open_recorder()
    recorder.close()
    (recorder.folder / "metrics.jsonl").write_text('{"step": 0}\nnonsense\n{"step": 2}\n')
    with pytest.raises(UsageError, match="metrics.jsonl:2"):
        open_recorder(first_step=3)


def test_trajectories_come_back_with_their_text(open_recorder):
    made = groups(3, 10, random.Random(0))
    with open_recorder() as recorder:
        recorder.trajectories(3, made, decode)
        recorder.log(3, {})
    back = read_trajectories(recorder.folder, 3)
    assert [r.trajectory for r in back] == [t for group in made for t in group.trajectories]
    for recorded in back:
        assert encode(recorded.prompt) == recorded.trajectory.prompt
        for turn, (generated, observation) in zip(recorded.trajectory.turns, recorded.turns, strict=True):
            assert encode(generated) == turn.tokens
            assert observation == (decode(turn.observation) if turn.observation else "")
    with pytest.raises(UsageError, match="the nearest is 3"):
        read_trajectories(recorder.folder, 5)


def test_only_the_last_trajectory_files_are_kept(open_recorder):
    with open_recorder(trajectories_kept=2) as recorder:
        for step in range(4):
            recorder.trajectories(step, groups(step, 10, random.Random(step)), decode)
        recorder.log(3, {})
    assert recorded_steps(recorder.folder) == [2, 3]


def test_configuration_is_kept_resolved(open_recorder, tmp_path):
    recorder = open_recorder()
    recorder.close()
    kept = RunConfig.model_validate(yaml.safe_load((recorder.folder / "config.yaml").read_text()))
    assert kept == run_config(steps=10, runs=str(tmp_path), observability={"progress": False})


def test_failed_run_leaves_its_rows_but_no_report(open_recorder):
    with pytest.raises(ZeroDivisionError), open_recorder() as recorder:
        recorder.log(0, {"reward/mean": 1})
        raise ZeroDivisionError
    assert len(read_metrics(recorder.folder)) == 1
    assert not (recorder.folder / "report.html").exists()


def test_wandb_that_is_not_installed_is_said(open_recorder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(UsageError, match=r"observability.wandb = 'offline'.*megatron-pbsd\[wandb\]"):
        open_recorder(wandb="offline")


def test_wandb_offline_keeps_the_rows(open_recorder):
    """With the real package: what `wandb sync` would send lies in the run's folder."""
    with open_recorder(wandb="offline") as recorder:
        recorder.log(0, {"reward/mean": 0.25})
        folder = recorder.folder
    (kept,) = folder.rglob("run-*.wandb")
    assert b"reward/mean" in kept.read_bytes()

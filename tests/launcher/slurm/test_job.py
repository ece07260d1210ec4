"""What a job script learns of Slurm, and what it does without one."""

from __future__ import annotations

from datetime import datetime

import pytest

from launcher.cli import main
from launcher.slurm.attempts import PREEMPTED, TIME_LIMIT, Attempt
from launcher.slurm.commands import accounted, fields
from launcher.slurm.job import end_of, state_of, why_asked
from launcher.slurm.records import read_attempts, submitted_config, write_attempt
from launcher.slurm.submit import seeds_of
from megatron_pbsd.errors import UsageError

# As `scontrol show job -o` of Slurm 22.05 prints it.
JOB = fields("JobId=7 JobName=curve JobState=RUNNING Reason=None Restarts=1 RunTime=00:00:01 TimeLimit=1-00:00:00 "
             "StartTime=2026-11-22T06:00:00 NodeList=node[1-2] Command=(null)\n")
START = datetime(2026, 11, 22, 6).timestamp()
DAY = 86400


@pytest.mark.parametrize(("passed", "job", "why"), [
    (DAY - 300, JOB, TIME_LIMIT), (DAY - 380, JOB, TIME_LIMIT), (DAY + 5, JOB, TIME_LIMIT),
    (DAY - 400, JOB, PREEMPTED), (10, JOB, PREEMPTED),
    (DAY - 300, JOB | {"TimeLimit": "UNLIMITED"}, PREEMPTED), (DAY - 300, {}, PREEMPTED),
    (DAY - 300, JOB | {"PreemptTime": "2026-11-23T05:55:00"}, PREEMPTED),
])
def test_why_slurm_asks_a_run_to_stop(passed, job, why):
    assert why_asked(job, START + passed, stop_before_s=300) == why


@pytest.mark.parametrize(("passed", "job", "state"), [
    (10, JOB, "RUNNING"), (10, JOB | {"JobState": "COMPLETING"}, "COMPLETING"),
    (DAY + 1, JOB | {"JobState": "COMPLETING"}, "TIMEOUT"),
    (10, JOB | {"JobState": "COMPLETING", "PreemptTime": "2026-11-23T05:55:00"}, "PREEMPTED"),
    (DAY + 1, JOB | {"JobState": "COMPLETING", "TimeLimit": "UNLIMITED"}, "COMPLETING"), (10, {}, "")])
def test_what_a_job_ends_of_while_slurm_does_not_say(passed, job, state):
    assert state_of(job, START + passed) == state


def test_what_slurm_prints_is_read():
    assert JOB["JobState"] == "RUNNING" and JOB["NodeList"] == "node[1-2]" and JOB["Command"] == "(null)"
    assert accounted("FAILED|1:0|node1|2026-11-22T06:00:00|2026-11-22T07:00:00\n")["JobState"] == "FAILED"
    assert accounted("") == {}


def test_records_of_attempts_come_back(tmp_path):
    made = [Attempt(n, "7_2", ("node1", "node2"), 1.5 * n, 9.0, 1, n, state="RUNNING", error="learner: died")
            for n in (1, 2, 10)]
    for attempt in reversed(made):
        write_attempt(tmp_path, attempt)
    assert read_attempts(tmp_path) == made
    (tmp_path / "attempts" / "2" / "attempt.json").write_text('{"number": 2')
    with pytest.raises(UsageError, match="attempts/2/attempt.json is no record"):
        read_attempts(tmp_path)
    log = tmp_path / "job.log"
    log.write_text("a" * (1 << 17) + "end")
    assert end_of(log).endswith("aend") and end_of(tmp_path / "none") == ""
    assert submitted_config(tmp_path) == tmp_path / "config.yaml"


@pytest.mark.parametrize(("text", "seeds"), [("1-4", [1, 2, 3, 4]), ("7", [7]), ("1,5-6,9%2", [1, 5, 6, 9])])
def test_seeds(text, seeds):
    assert seeds_of(text) == seeds


@pytest.mark.parametrize("text", ["", "a", "1-", "1,1", "4-1", "1-4%0", "1%2%3"])
def test_no_seeds(text):
    with pytest.raises(UsageError, match="--seeds"):
        seeds_of(text)


def test_without_slurm_it_is_said_how_to_run(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["submit", "configs/quickstart.yaml"]) == 2
    said = capsys.readouterr().err
    assert "no sbatch in PATH" in said and "pbsd train configs/quickstart.yaml" in said and "--ray-address" in said


def test_a_run_that_was_not_submitted_is_named(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("steps: 1\n")
    assert main(["status", str(tmp_path)]) == 2
    assert f"{tmp_path} was not submitted" in capsys.readouterr().err

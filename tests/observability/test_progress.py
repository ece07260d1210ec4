from __future__ import annotations

import io

import pytest
from hypothesis import given, strategies as st
from rich.console import Console

from megatron_pbsd.observability.progress import (
    BARS,
    LiveProgress,
    PlainProgress,
    Silent,
    duration,
    eta,
    make_progress,
    sparkline,
)

ROWS = [{"step": step, "reward/mean": step / 10, "rollout/tokens_per_s": 3000.0, "time/step_s": 2.0}
        for step in range(5)]


@pytest.fixture
def terminal():
    return Console(file=io.StringIO(), force_terminal=True, width=100)


@pytest.fixture
def log_file():
    return Console(file=io.StringIO(), width=40)


def test_one_plain_line_per_step_without_a_terminal(log_file):
    progress = make_progress(True, "run", 10, [], log_file)
    assert isinstance(progress, PlainProgress)
    progress.phase("rollout")
    progress.rollout(3, 8)
    progress.step({**ROWS[0], "eval/exact_match": 0.125})
    progress.step(ROWS[1])
    lines = log_file.file.getvalue().splitlines()
    assert lines == ["step 0/10  reward 0.000  exact match 12.5%  tokens/s 3,000  2.0 s  ETA 0:20",
                     "step 1/10  reward 0.100  tokens/s 3,000  2.0 s  ETA 0:18"]


def test_live_display_shows_where_the_run_is(terminal):
    progress = make_progress(True, "my-run", 10, [{**ROWS[0], "eval/exact_match": 0.5}, *ROWS[1:]], terminal)
    assert isinstance(progress, LiveProgress)
    progress.phase("rollout")
    progress.rollout(48, 128)
    plain = Console(file=io.StringIO(), width=100)
    plain.print(progress.render())
    progress.close()
    shown = plain.file.getvalue()
    for words in ("my-run", "step 4/10", "ETA 0:12", "0.400", BARS[-1], "50.0%", "3,000 tokens/s", "rollout",
                  "48/128 trajectories"):
        assert words in shown, (words, shown)


def test_nothing_when_not_wanted(terminal):
    progress = make_progress(False, "run", 10, [], terminal)
    assert isinstance(progress, Silent)
    progress.step(ROWS[0])
    assert terminal.file.getvalue() == ""


def test_eta_counts_the_steps_that_are_left():
    assert eta([], 10) is None and duration(None) == "–"
    assert eta(ROWS, 10) == 12.0
    assert eta([{"step": 10, "time/step_s": 3.0}], 10) == 0.0
    assert duration(3725.4) == "1:02:05"


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=200))
def test_sparkline_spans_lowest_to_highest(values):
    line = sparkline(values)
    assert len(line) == min(len(values), 40) and set(line) <= set(BARS)
    if 1 < len(values) <= 40 and max(values) - min(values) > 1:
        assert line[values.index(max(values))] == BARS[-1] and line[values.index(min(values))] == BARS[0]

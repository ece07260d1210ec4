from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from hypothesis import given, strategies as st
from synthetic_run import run_config, write_run

from megatron_pbsd.errors import UsageError
from megatron_pbsd.observability.charts import Line, histogram, line_chart, number, stacked_bars, ticks
from megatron_pbsd.observability.recorder import Recorder
from megatron_pbsd.observability.records import read_trajectories
from megatron_pbsd.observability.report import write_report
from megatron_pbsd.observability.samples import evidence_limit, pick, signed

FINITE = st.floats(-1e9, 1e9, allow_subnormal=False)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs"), steps=12)


@pytest.fixture(scope="module")
def page(run):
    return (run / "report.html").read_text()


class Balance(HTMLParser):
    """Fails on tags that are not closed in order."""

    VOID = frozenset({"meta", "br", "input"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_is_well_formed_and_needs_nothing_else(page):
    parser = Balance()
    parser.feed(page)
    assert parser.open == []
    assert not re.search(r"""(src|href)=|url\(|@import|fetch\(""", page)
    for chart in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        ElementTree.fromstring(chart)


def test_page_has_every_section_and_the_final_numbers(page, run):
    for title in ("Learning", "Statistics", "Time", "Lengths", "Trajectories", "Configuration"):
        assert f">{title}<" in page
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert f"{100 * rows[-1]['eval/exact_match']:.1f}%" in page
    assert "evidence solved" in page and "grad norm" in page and "log-probs" in page


def test_text_is_escaped(page):
    assert "<b>central</b>" not in page and "&lt;b&gt;central&lt;/b&gt;" in page
    assert "&lt;|answer &amp; &#x27;cite&#x27;|&gt;" in page


def test_turns_are_coloured_by_evidence_and_print_it(page, run):
    recorded = pick(read_trajectories(run, 9), solved=True)[0]  # the late steps are 9 to 11
    for evidence, advantage in zip(recorded.trajectory.evidence, recorded.trajectory.turn_advantages, strict=True):
        assert f"evidence <b>{signed(evidence)}</b> nats" in page
        assert f"advantage <b>{signed(advantage)}</b>" in page
    assert 'class="turn good" style="--strength:' in page and 'class="turn bad" style="--strength:' in page


def test_report_of_a_run_without_trajectories_or_evaluations(tmp_path):
    config = run_config(runs=str(tmp_path), observability={"progress": False}, algorithm={"name": "sft"})
    with Recorder(config.folder, config.observability, config, 0) as recorder:
        recorder.log(0, {"loss/total": 1.0})
    page = write_report(config.folder).read_text()
    assert "Statistics" in page and "Trajectories" not in page and "Learning" not in page


def test_recovered_weights_are_told_and_no_chart(tmp_path):
    folder = tmp_path / "recovered"
    with Recorder(folder, run_config().observability, run_config(), 0) as recorder:
        recorder.log(4, {"loss/total": 1.0})
        recorder.log(5, {"loss/total": 1.0, "recovered/weights_step": 4.0, "recovered/optimizer_step": 3.0})
    page = (folder / "report.html").read_text()
    assert "Before step 5: weights of step 4 recovered from the engines, optimizer state of step 3." in page
    assert page.count("recovered") == 1 and 'class="of">loss' in page


def test_a_run_without_steps_has_no_report_yet(tmp_path):
    config = run_config(runs=str(tmp_path), observability={"progress": False})
    recorder = Recorder(config.folder, config.observability, config, 0)
    recorder.close()
    with pytest.raises(UsageError, match="at least one step"):
        write_report(config.folder)


def test_trajectories_without_evidence_have_no_scale(run):
    recorded = read_trajectories(run, 0)
    assert evidence_limit(recorded) > 0
    assert evidence_limit([]) is None


@given(FINITE, FINITE)
def test_ticks_enclose_the_values_at_even_distances(a, b):
    low, high = min(a, b), max(a, b)
    marks = ticks(low, high)
    slack = 1e-6 * max(abs(low), abs(high), 1e-9)
    assert marks[0] <= low + slack and marks[-1] >= high - slack and 2 <= len(marks) <= 8


@given(st.lists(st.tuples(st.integers(0, 10_000), FINITE), min_size=1, max_size=30, unique_by=lambda p: p[0]))
def test_line_charts_are_drawn_inside_their_frame(points):
    points = sorted(points)
    chart = line_chart("a < b", [Line("x", points, labels=[len(points) - 1], dots=True)], width=560, height=250)
    root = ElementTree.fromstring(chart)
    numbers = re.findall(r"[ML]([-\d.]+) ([-\d.]+)", "".join(p.get("d", "") for p in root.iter("path")))
    assert len(numbers) == len(points)
    assert all(0 <= float(x) <= 560 and 0 <= float(y) <= 250 for x, y in numbers)


@given(st.lists(st.integers(0, 600), min_size=1), st.lists(st.integers(0, 600), min_size=1))
def test_histograms_count_every_value_once(early, late):
    root = ElementTree.fromstring(histogram("h", [("early", "red", early), ("late", "blue", late)], "tokens"))
    tips = json.loads(root.get("data-tips"))
    for place, values in ((2, early), (3, late)):
        shares = [float(tip[place].split()[-1].rstrip("%")) for tip in tips]
        assert abs(sum(shares) - 100) <= 0.05 * len(shares) + 1e-6, (shares, values)


def test_bars_stack_to_the_total_of_a_step():
    layers = [("a", "red", [1.0, 0.0]), ("b", "blue", [2.0, 3.0])]
    root = ElementTree.fromstring(stacked_bars("t", [0, 1], layers, number))
    assert json.loads(root.get("data-tips"))[0][1:] == ["step 0: 3", "b 2", "a 1"]


@pytest.mark.parametrize(("value", "text"), [
    (0.0, "0"), (1.0, "1"), (-0.02891, "−0.0289"), (1234.5, "1,234"), (1e-7, "1e-07"), (99.96, "100"), (-3, "−3"),
    (4_199_936, "4.2M"), (25_000, "25k"), (3e13, "3e+04G"),
])
def test_numbers_have_three_significant_digits(value, text):
    assert number(value) == text

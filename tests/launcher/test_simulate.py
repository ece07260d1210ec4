"""`pbsd simulate`: its files, its overrides, its table, its picture."""

import json
import re
from pathlib import Path

import pytest

from launcher.cli import main
from launcher.simulate import load_workload
from launcher.sources import ConfigError

WORKLOADS = sorted((Path(__file__).parents[2] / "configs" / "workloads").glob("*.yaml"))
SMALL = ["--requests.groups", "12", "--requests.mean", "900", "--requests.limit", "4000", "--engines", "2", "--seeds",
         "1", "--policies", "[divided, longest_remaining+speculation]"]


def test_shipped_workloads():
    """Requests, lengths and engines as published."""
    found = {path.stem: load_workload(path) for path in WORKLOADS}
    sizes = {name: (w.requests.groups * w.requests.group_size, w.requests.group_size, w.requests.limit,
                    w.requests.mean, w.engines, w.hardware.gpus) for name, w in found.items()}
    assert sizes == {"moonlight": (3200, 8, 65536, 22386, 32, 1), "qwen2_vl_72b": (9600, 16, 40960, 7615, 16, 8),
                     "kimi_k2": (6400, 8, 98304, 38959, 8, 32)}


def test_json_and_picture(capsys, tmp_path):
    picture = tmp_path / "picture.html"
    assert main(["simulate", str(WORKLOADS[1]), "--json", "--html", str(picture), *SMALL]) == 0
    results = json.loads(capsys.readouterr().out)
    assert list(results["policies"]) == ["group_pinned", "divided", "longest_remaining+speculation"]
    for row in results["policies"].values():
        assert {"throughput_rel", "total_s", "tail_s", "idle"} <= row.keys()
    text = picture.read_text()
    assert text.count("<svg") == 2 + len(results["policies"])  # two curves, and the engines under each policy
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")
    tips = json.loads(re.search(r'data-tips="([^"]*)"', text)[1].replace("&quot;", '"'))
    assert tips[0][1:] == ["0 s", *(f"{name} 100%" for name in results["policies"])]


def test_table(capsys):
    assert main(["simulate", str(WORKLOADS[1]), *SMALL]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["policy", "throughput", "published"]
    assert lines[1].split()[:3] == ["group_pinned", "1.00", "1.00"]


def test_every_problem_is_named_with_its_place(tmp_path):
    path = tmp_path / "w.yaml"
    path.write_text(WORKLOADS[0].read_text().replace("groups:", "group:").replace("gpus: 32", "gpus: none"))
    with pytest.raises(ConfigError) as wrong:
        load_workload(path, ["--requests.correlation", "2"])
    message = str(wrong.value)
    assert "requests.group = 800" in message and "did you mean 'groups'?" in message and "requests.groups" in message
    assert "hardware.gpus = \"none\"" in message and "requests.correlation = 2   (command line)" in message

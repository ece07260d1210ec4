from __future__ import annotations

import json
import os

import pytest

from megatron_pbsd.observability.trace import Trace


def events(path) -> list[dict]:
    return [event for event in json.loads(path.read_text()) if event["ph"] == "X"]


def test_is_valid_json_after_every_event(tmp_path):
    path = tmp_path / "trace.json"
    trace = Trace(path)
    assert events(path) == []
    for count in range(1, 4):
        with trace.span("rollout", step=count):
            pass
        assert len(events(path)) == count
    assert events(path)[-1]["args"] == {"step": 3}


def test_spans_nest_in_time_and_survive_errors(tmp_path):
    path = tmp_path / "trace.json"
    trace = Trace(path)
    with pytest.raises(ZeroDivisionError), trace.span("outer"), trace.span("inner"):
        raise ZeroDivisionError
    inner, outer = events(path)
    assert (inner["name"], outer["name"]) == ("inner", "outer")
    assert outer["dur"] >= inner["dur"] and outer["ts"] <= inner["ts"]


@pytest.mark.parametrize("lost", [0, 1, 3, 5, 20])
def test_a_resumed_run_continues_a_trace_that_a_crash_cut(tmp_path, lost):
    path = tmp_path / "trace.json"
    trace = Trace(path)
    for name in ("a", "b"):
        with trace.span(name):
            pass
    trace.close()
    os.truncate(path, path.stat().st_size - lost)
    again = Trace(path)
    with again.span("c"):
        pass
    again.close()
    assert [event["name"] for event in events(path)] == (["a", "b", "c"] if lost < 5 else ["a", "c"])


def test_lanes_keep_their_place_when_a_run_is_resumed(tmp_path):
    path = tmp_path / "trace.json"
    for lanes in (["engine-1", "driver"], ["engine-0", "engine-1"]):
        trace = Trace(path)
        for lane in lanes:
            trace.add("step", 1_000, 500, lane=lane, chunks=3)
        trace.close()
    places = {event["args"]["name"]: event["tid"] for event in json.loads(path.read_text())
              if event["name"] == "thread_name"}
    assert len(set(places.values()) | {0}) == 3
    assert [event["tid"] for event in events(path)] == [
        places["engine-1"], 0, places["engine-0"], places["engine-1"]]
    assert events(path)[0] | {"tid": 0} == {"name": "step", "ph": "X", "pid": 0, "tid": 0, "ts": 1.0, "dur": 0.5,
                                            "args": {"chunks": 3}}

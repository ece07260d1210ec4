"""Machines that meet, over real connections and files; and processes that an earlier attempt has left."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import psutil
import pytest

from launcher.node import meeting as module
from launcher.node.attempt import Attempt
from launcher.node.meeting import Head, Meeting, NodeError, find_head
from launcher.node.member import Member
from launcher.node.orphans import MARK, end_orphans, mark
from megatron_pbsd.ports import free_port

HEAD, OTHER = Member(0, 2, job="5.0"), Member(1, 2, job="5.0")


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "attempts" / "3"
    made.mkdir(parents=True)
    return made


@pytest.fixture
def meet(folder):
    made = []

    def meeting(secret="secret", job="5.0"):
        port = free_port()
        made.append(Meeting(HEAD, "127.0.0.1", port, secret, folder))
        Head("127.0.0.1", port, "secret", job, 3).write(folder)
        return made[-1]

    yield meeting
    for each in made:
        each.close()


def heard(meeting):
    """The first that it hears of."""
    return next(iter(meeting.heard(10.0)))


def test_what_one_side_says_the_other_hears_and_its_end_too(meet, folder):
    meeting = meet()
    head, line = find_head(folder.parent, OTHER, 10.0)
    assert (head.attempt, head.address) == (3, "127.0.0.1")
    assert heard(meeting) == (1, {"here": True})
    meeting.tell_all(ray="1.2.3.4:5")
    assert next(line.messages()) == {"ray": "1.2.3.4:5"}
    line.send(up=True)
    assert heard(meeting) == (1, {"up": True})
    line.close()
    assert heard(meeting) == (1, None)


def test_the_secret_is_for_those_who_can_read_the_folder(meet, folder):
    meet()
    assert (folder / "head.json").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(("secret", "job", "reason"), [
    ("another", "5.0", "has hung up: is that another one by now"),
    ("secret", "4.0", "head.json does not appear: is .* on a file system that all nodes share")])
def test_a_head_that_is_not_ours_is_not_followed(meet, folder, secret, job, reason):
    meet(secret, job)
    with pytest.raises(NodeError, match=f"did not find the head, node rank 0, within 0.5 s: .*{reason}"):
        find_head(folder.parent, OTHER, 0.5)


def test_a_head_of_an_attempt_that_died_is_waited_out(folder):
    Head("127.0.0.1", free_port(), "secret", "5.0", 3).write(folder)
    with pytest.raises(NodeError, match="nobody answers at 127.0.0.1:.*Connection refused"):
        find_head(folder.parent, OTHER, 0.5)


def test_who_is_silent_is_taken_for_gone(meet, folder, monkeypatch):
    monkeypatch.setattr(module, "SILENCE_S", 0.5)
    monkeypatch.setattr(module, "BEAT_S", 60.0)
    meeting = meet()
    _, line = find_head(folder.parent, OTHER, 10.0)
    assert heard(meeting) == (1, {"here": True})
    assert heard(meeting) == (1, None)
    assert list(line.messages()) == []


def test_an_attempt_leaves_a_record_and_knows_when_a_later_one_has_begun(tmp_path):
    first = Attempt(tmp_path, {}, ["a", "b"])
    first.training(["a", "c"])
    assert not first.superseded()
    second = Attempt(tmp_path, {}, ["a"])
    assert (first.number, second.number) == (1, 2) and first.superseded() and not second.superseded()
    first.ended(1, "b is gone")
    record = json.loads((tmp_path / "attempts" / "1" / "nodes.json").read_text())
    assert (record["phase"], record["nodes"], record["exit_code"], record["error"]) == (
        "ended", ["a", "c"], 1, "b is gone")
    assert Attempt(tmp_path, {"PBSD_ATTEMPT": "9"}, []).number == 9


def test_processes_of_earlier_attempts_are_ended_and_no_others(tmp_path):
    def start(marked):
        return subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE,
                                env={**os.environ, MARK: marked})

    run = tmp_path / "run"
    old, current, other = start(mark(run, 1)), start(mark(run, 2)), start(mark(tmp_path / "another_run", 1))
    try:
        assert end_orphans(run, 2) == [old.pid]
        assert not psutil.pid_exists(old.pid) and current.poll() is None and other.poll() is None
    finally:
        for process in (old, current, other):
            process.kill()
            process.wait()

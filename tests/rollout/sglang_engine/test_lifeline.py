"""What holds a server's parts together, without servers."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import wait

import pytest

from megatron_pbsd.ports import free_port
from megatron_pbsd.rollout.engines.protocol import EngineError
from megatron_pbsd.rollout.engines.sglang.lifeline import LastWords, Lifeline, Meeting, Parts

WAIT_S = 30.0


@pytest.fixture
def held():
    """The engine's side, and two parts that have been told to start."""
    meeting = Meeting("127.0.0.1", free_port(), 3)
    with ThreadPoolExecutor(2) as threads:
        coming = [threads.submit(Lifeline, f"engine-0.node{number}", meeting, WAIT_S) for number in (1, 2)]
        parts = Parts(meeting, WAIT_S)
        yield parts, [each.result() for each in coming]


def test_all_are_told_the_same(held):
    parts, lifelines = held
    mine = parts.start({"weight_version": "0@x"})
    orders = [lifeline.order() for lifeline in lifelines]
    assert orders[0] == orders[1] and mine == orders[0] | {"node_rank": 0}
    assert orders[0]["nnodes"] == 3 and orders[0]["dist_init_addr"].startswith("127.0.0.1:")
    assert not wait(lifelines, 0)


@pytest.mark.parametrize("words", [LastWords("engine-0.node2", "ended", ("one", "two")), None])
def test_who_ends_is_noticed_and_says_why(held, words):
    parts, (first, second) = held
    parts.start({})
    assert first.order() == second.order()
    noticed = threading.Event()
    parts.watch(noticed.set)
    if words:
        second.say(words)
    second.close()
    assert noticed.wait(WAIT_S)
    letting_go = threading.Thread(target=lambda: (wait([first]), first.close()))
    letting_go.start()
    assert parts.end(WAIT_S) == [words or LastWords("engine-0.node2", "it, or its machine, is gone")]
    letting_go.join(WAIT_S)
    assert parts.end(0.0) == []


def test_parts_hear_that_the_engine_is_gone_before_it_has_told_them_anything(held):
    parts, lifelines = held
    letting_go = threading.Thread(target=lambda: [each.close() for each in lifelines if each.order() is None])
    letting_go.start()
    assert parts.end(0.0) == []
    letting_go.join(WAIT_S)
    assert not letting_go.is_alive()


def test_those_that_do_not_come_are_an_error_on_both_sides():
    meeting = Meeting("127.0.0.1", free_port(), 2)
    with pytest.raises(EngineError, match="of the server's 2 machines 1 have come within .*start_deadline_s = 0.1"):
        Parts(meeting, 0.1)
    with pytest.raises(EngineError, match="engine-0.node1: nobody waits for it at 127.0.0.1"):
        Lifeline("engine-0.node1", meeting, 0.1)

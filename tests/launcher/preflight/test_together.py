"""Real processes as nodes: what they find out together, and that none waits for one that is gone."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.preflight.check import together
from launcher.preflight.facts import Interface, NodeFacts
from launcher.preflight.findings import Expected
from launcher.preflight.meeting import Place, PreflightError
from launcher.preflight.rules import diagnose, to_exclude
from launcher.preflight.watchdog import Watchdog
from megatron_pbsd.ports import free_port

DEADLINE_S = 4.0
NAMES = ("anna", "bert", "cleo")


def facts(rank: int, **changes) -> NodeFacts:
    lo = Interface("lo", "127.0.0.1", "255.0.0.0", True, 65536)
    return replace(NodeFacts(rank, NAMES[rank], NAMES[rank], "127.0.0.1", "127.0.0.1", interfaces=(lo,)), **changes)


class Sends:
    """A clock that sends its process a signal when it is looked at."""

    def __init__(self, number: signal.Signals):
        self.number = number

    def __call__(self) -> float:
        os.kill(os.getpid(), self.number)
        return 0.0


class Off:
    def __init__(self, seconds: float):
        self.seconds = seconds

    def __call__(self) -> float:
        return time.time() + self.seconds


def be_a_node(connection, mine: NodeFacts, place: Place, shared: Path, clock) -> None:
    os.dup2(os.open(shared.parent / f"{mine.rank}.err", os.O_CREAT | os.O_WRONLY), 2)
    watchdog = Watchdog(f"node {mine.rank}", 5 * DEADLINE_S)
    try:
        connection.send(together(mine, place, shared, clock, watchdog.enter, probes_s=0.0))
    except PreflightError as error:
        connection.send(str(error))


@pytest.fixture(scope="module")
def processes():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["launcher.preflight.check"])
    return context


@pytest.fixture
def run(processes, tmp_path):
    """What nodes came to, by rank; '' of one that died. clocks, folders, changed: of some of them. still: who stands
    still, and is not waited for."""

    def start(ranks, clocks={}, folders={}, changed={}, still=()):  # noqa: B006
        port, nodes = free_port(), {}
        for rank in ranks:
            ours, theirs = processes.Pipe()
            place = Place(rank, 3, "127.0.0.1", port, NAMES, DEADLINE_S)
            process = processes.Process(target=be_a_node, daemon=True, args=(
                theirs, facts(rank, **changed.get(rank, {})), place, folders.get(rank, tmp_path / "run"),
                clocks.get(rank, time.time)))
            process.start()
            theirs.close()
            nodes[rank] = process, ours
        results = {}
        for rank, (process, ours) in nodes.items():
            try:
                assert rank in still or ours.poll(90), f"node {rank} hangs"
                if rank in still:
                    continue
                results[rank] = ours.recv()
            except EOFError:
                results[rank] = ""
            finally:
                process.kill()
                process.join()
        return results

    return start


def test_nodes_that_meet_all_know_the_same(run, tmp_path):
    results = run(range(3), clocks={2: Off(7.0)})
    observed = results[0]
    assert results == {0: observed, 1: observed, 2: observed}
    assert [node.name for node in observed.nodes] == list(NAMES) and not observed.missing and not observed.lost
    assert all(canary.unseen == {} for canary in observed.canaries) and len(observed.canaries) == 3
    offsets = {clock.rank: clock for clock in observed.clocks}
    assert abs(offsets[1].offset_s) <= offsets[1].uncertainty_s + 0.05
    assert abs(offsets[2].offset_s - 7.0) <= offsets[2].uncertainty_s + 0.05
    assert [(pair.first, pair.second) for pair in sorted(observed.pairs, key=lambda one: (one.first, one.second))] == [
        (0, 1), (0, 2), (1, 2)]
    assert all(0.001 < pair.gb_s < 1000 for pair in observed.pairs)
    assert sorted(one.rank for one in observed.all_reduce) == [0, 1, 2]
    assert all(one.gb_s > 0.001 for one in observed.all_reduce)
    assert list((tmp_path / "run").iterdir()) == [], "canaries are taken away"
    assert ("clocks", 2) in {(one.check, one.rank) for one in diagnose(observed, Expected())}


def test_one_that_does_not_come_is_named_and_others_go_on(run):
    results = run([0, 1])
    observed = results[0]
    assert observed == results[1] and observed.missing == {2: "cleo"} and len(observed.pairs) == 1
    found = diagnose(observed, Expected())
    assert ("error", "nodes", 2) in {(one.severity, one.check, one.rank) for one in found}
    assert to_exclude(observed, found) == ["cleo"]


@pytest.mark.slow
def test_one_that_dies_on_the_way_is_named_and_others_go_on(run):
    results = run(range(3), clocks={1: Sends(signal.SIGKILL)})
    observed = results[0]
    assert results == {0: observed, 1: "", 2: observed}
    assert observed.lost == {1: "when it was asked for the time"}
    assert [(pair.first, pair.second) for pair in observed.pairs] == [(0, 2)] and observed.pairs[0].gb_s


@pytest.mark.slow
def test_a_folder_that_one_does_not_share_is_found(run, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    observed = run(range(3), folders={2: tmp_path / "elsewhere"})[0]
    found = [one for one in diagnose(observed, Expected()) if one.check == "shared folder"]
    assert [(one.rank, one.blames_node, one.measured) for one in found] == [(2, True, "No such file or directory")]


@pytest.mark.slow
def test_one_that_reaches_nobody_is_found(run):
    nowhere = Interface("lo", "192.0.2.77", "255.0.0.0", True, 1500)
    observed = run(range(3), changed={1: {"interfaces": (nowhere,), "route_address": "192.0.2.77"}})[0]
    assert {(pair.first, pair.second): pair.gb_s is None for pair in observed.pairs} == {
        (0, 1): True, (1, 2): True, (0, 2): False}
    found = [one for one in diagnose(observed, Expected()) if one.check == "connections"]
    assert [one.rank for one in found] == [1] and observed.all_reduce == ()


@pytest.mark.slow
def test_without_node_0_the_others_say_so(run):
    results = run([1, 2])
    assert all("did not reach node 0 (anna) at 127.0.0.1" in said for said in results.values())
    results = run(range(3), clocks={0: Sends(signal.SIGKILL)})
    assert results[0] == "" and all("node 0 (anna)" in results[rank] for rank in (1, 2))


@pytest.mark.slow
def test_one_that_stands_still_is_left_out(run, tmp_path):
    observed = run([0, 2, 1], clocks={1: Sends(signal.SIGSTOP)}, still=[1])[0]
    assert observed.lost == {1: "when it was asked for the time"} and len(observed.pairs) == 1
    # torch's store itself waits for node 0 without an end.
    assert run([1, 2, 0], clocks={0: Sends(signal.SIGSTOP)}, still=[0]) == {1: "", 2: ""}
    for rank in (1, 2):
        assert f"node {rank} has been in 'clocks' for 20 s" in (tmp_path / f"{rank}.err").read_text()

"""`pbsd node` on machines with an address, /tmp and /dev/shm of their own, through all that can happen to them."""

from __future__ import annotations

import os
import signal

import pytest
from machines import Machines
from pbsd_nodes import START_S, Run, left_of
from pbsd_process import SMALL

pytestmark = pytest.mark.slow
STEPS = 12
OPTIONS = (*SMALL, "--steps", str(STEPS), "--checkpoint.every", "1", "--evaluation.every", "0")
SAME = ("reward/mean", "loss/total", "grad_norm", "rollout/tokens")


@pytest.fixture(scope="module")
def machines(tmp_path_factory):
    made = Machines(3, tmp_path_factory.mktemp("machines").resolve())
    yield made
    made.close()


@pytest.fixture(scope="module")
def whole(pbsd):
    """On one machine."""
    return pbsd("one_machine", *OPTIONS).succeed()


def same(rows: list[dict], expected: list[dict]) -> None:
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    for ours, theirs in zip(rows[1:], expected[1:], strict=True):
        for key in SAME:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-6), (ours["step"], key)


@pytest.mark.parametrize("kind", ["collective"])
def test_learner_and_engines_on_different_machines_do_what_they_do_on_one(machines, whole, kind):
    run = Run(machines, machines.names, machines.folder / kind, *OPTIONS, "--rollout.transport.kind", kind)
    run.start()
    assert run.ends(START_S) == {"node1": 0, "node2": 0, "node3": 0}, run.said()
    record = run.record()
    assert (record["phase"], record["exit_code"], record["nodes"]) == ("ended", 0, machines.names)
    same(run.rows(), whole)
    assert left_of(machines) == []


def test_without_ray_on_a_node_all_end_and_the_next_attempt_goes_on(machines, whole):
    """Other losses, of nodes, connections and time, are those of tests/slurm_cluster/faults.py."""
    run = Run(machines, machines.names[:2], machines.folder / "faults", *OPTIONS, "--rollout.transport.kind", "disk")

    run.start()
    run.go_on_for(1)
    (raylet,) = machines.processes("node2", "raylet/raylet")
    os.kill(raylet, signal.SIGKILL)
    assert set(run.ends().values()) == {1}
    assert "node2: Ray has ended" in run.record()["error"] and "pbsd: node: node2" in run.said()
    assert left_of(machines) == []

    run.start()
    assert set(run.ends(START_S).values()) == {0}, run.said()
    same(run.rows(), whole)
    assert left_of(machines) == []

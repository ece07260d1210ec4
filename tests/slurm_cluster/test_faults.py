"""A run on two nodes, in which learner and engine are on different ones, survives what happens to clusters."""

from __future__ import annotations

import pytest
from slurm_cluster.faults import FAULTS, STEPS, survive_all
from slurm_cluster.submitted import Alone, Submitted, assert_same

pytestmark = pytest.mark.slurm


def test_a_run_survives_every_fault_and_does_every_step_once(cluster):
    """The same steps, with the same losses, as on one machine that nothing happens to."""
    with Alone(cluster, "unharmed", "--steps", str(STEPS)) as alone:
        found = {measured.fault: measured for measured in survive_all(cluster, "harmed")}
        assert len(found) == len(FAULTS) + 1
        run = Submitted(cluster, cluster.shared / "runs" / "harmed", ())
        status = run.status()
        assert status["state"] == "complete" and status["step"] == STEPS
        assert {len(attempt["nodes"]) for attempt in run.attempts()} == {2}
        for fault, how in (("the driver is killed", "SIGKILL"), ("its time limit comes near", "its time limit"),
                           ("a job of higher priority takes its node", "higher priority"),
                           ("it is cancelled, and submitted again", "cancelled")):
            assert how in found[fault].how, found[fault]
        assert_same(run.rows(), alone.rows())

"""Which jobs somebody who waits for a run may have started."""

from __future__ import annotations

from datetime import datetime

import pytest

from launcher.slurm.commands import SOON_S
from launcher.slurm.status import only_waits

NOW = datetime(2026, 5, 1, 12, 0, 0).timestamp()
REQUEUED = {"JobState": "PENDING", "Reason": "BeginTime", "Restarts": "1", "StartTime": "2026-05-01T12:02:00"}


@pytest.mark.parametrize(("change", "expected"), [
    ({}, True), ({"StartTime": "Unknown"}, True), ({"Restarts": "0"}, False), ({"Reason": "Resources"}, False),
    ({"JobState": "RUNNING"}, False),
    # It has been told to, and is not put off again and again.
    ({"StartTime": datetime.fromtimestamp(NOW + SOON_S).isoformat()}, False)])
def test_a_requeued_job_that_waits_for_nothing_else(change, expected):
    assert only_waits(REQUEUED | change, NOW) == expected


def test_slurm_without_a_record_of_the_job():
    assert not only_waits({}, NOW)

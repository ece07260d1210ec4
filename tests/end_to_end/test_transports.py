"""Whole runs with each transport come to the same, also when an engine dies during a rollout."""

from __future__ import annotations

import pytest
from pbsd_process import SMALL

from tests.end_to_end.test_failures import wait_for_rollout_after

pytestmark = pytest.mark.slow
OPTIONS = (*SMALL, "--steps", "4", "--checkpoint.every", "0")
KINDS = {"buckets": ("--rollout.transport.bucket_mb", "1"), "collective": ("--rollout.transport.bucket_mb", "1"),
         "disk": ("--rollout.transport.bucket_mb", "1", "--rollout.transport.deltas", "1")}


@pytest.fixture(scope="module")
def whole(pbsd):
    return pbsd("segment", *OPTIONS).succeed()


@pytest.mark.parametrize("kind", KINDS)
def test_an_engine_that_dies_is_given_the_weights_again(pbsd, whole, kind):
    run = pbsd(kind, *OPTIONS, "--rollout.transport.kind", kind, *KINDS[kind])
    run.wait_for_step(1)
    wait_for_rollout_after(run, lambda: max(row["step"] for row in run.rows()))
    run.component("engine-0").kill()
    code, errors = run.finish()
    assert code == 0, errors
    assert errors.count("engine-0 died: ") == 1
    rows = run.rows()
    assert [row["step"] for row in rows] == [row["step"] for row in whole]
    for ours, theirs in zip(rows[1:], whole[1:], strict=True):
        assert ours["weights/probe_max_abs"] < 1e-4
        for key in ("reward/mean", "loss/total", "grad_norm", "rollout/tokens"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-6), (ours["step"], key)

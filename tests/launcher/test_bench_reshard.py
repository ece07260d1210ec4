"""The bench `reshard`, its publication with a small model."""

from __future__ import annotations

import pytest

from launcher.bench import reshard
from launcher.published_layouts import PAIRS, TINY_EXPERTS

pytestmark = pytest.mark.slow


def test_publication_between_processes():
    """Bit for bit, or it raises. The embedding is the largest tensor, and has a bucket to itself."""
    found = reshard.publication(TINY_EXPERTS | {"hidden_size": 512}, bucket_bytes=1 << 20, rounds=2)
    assert found["buckets"] > 5 and found["bucket_mb"] == 4 and found["extra_buckets"] >= 2
    assert 0 < found["memcpy_ratio"] <= 2


def test_nothing_is_moved_that_need_not_be():
    found = reshard.bytes_moved()
    assert found["bytes_over_min"] == 1 and len(found["bytes_over_min_by_pair"]) == len(PAIRS) == 10


def test_a_trillion_parameters_are_planned_in_ten_seconds():
    """Of processor time, which other work on the machine prolongs less."""
    assert reshard.planning()["plan_1t_processor_s"] < 10

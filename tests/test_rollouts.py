from __future__ import annotations

from megatron_pbsd.rollouts import back_off_s


def test_an_engine_that_dies_again_and_again_is_waited_with():
    assert [back_off_s(restarts) for restarts in range(9)] == [0, 1, 2, 4, 8, 16, 32, 60, 60]

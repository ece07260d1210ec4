"""A server that orders requests, and has more than it runs at a time."""

from __future__ import annotations

from sglang_server.servers import ARGS, start

from megatron_pbsd.rollout.engines.protocol import Chunk


def test_of_those_that_wait_the_most_urgent_runs_first(models, tmp_path):
    engine = start(models["dense"], tmp_path, slots=1, args=ARGS | {
        "enable_priority_scheduling": True, "disable_priority_preemption": True})
    try:
        lengths = {1: 90, 6: 5, 3: 2, 5: 2, 2: 2, 4: 2}
        engine.submit([Chunk(str(place), (place, 6, 7), new, 0, 0.0, priority=-place)
                       for place, new in lengths.items()])
        ended = []
        while results := engine.collect():
            ended += [int(result.request_id) for result in results]
        # Whichever came to an idle server first did not wait.
        assert sorted(ended) == sorted(lengths) and ended[1:] == sorted(ended[1:])
        assert engine.statistics().decode_steps > 90
    finally:
        engine.close()

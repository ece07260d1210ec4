"""The bench's own bookkeeping: what is said to be trained on is what was generated."""

from __future__ import annotations

import pytest

from launcher.bench.live_rollout import OneTurn, save_model, start_engines
from launcher.bench.partial import LENGTHS, MODES, Mode, config, published, summary
from megatron_pbsd.controller.inline import InlineRuntime
from megatron_pbsd.resharding.shared_folder import SharedFolder
from megatron_pbsd.rollout.coordinator import Coordinator
from megatron_pbsd.rollout.engines.embedded.kv_pool import PoolPlace
from megatron_pbsd.simulation.workload import jobs


@pytest.mark.slow
def test_every_token_is_trained_on_dropped_or_waits(tmp_path):
    lengths = {f"{step}/{job.request_id}": max(1, job.tokens // 4) for step in range(3)
               for job in jobs(LENGTHS, seed=step)}
    save_model(str(tmp_path))
    with SharedFolder() as pool:
        runtime = InlineRuntime()
        engines = start_engines(runtime, str(tmp_path), lengths=lengths, step_s=0.0,
                                kv_pool=PoolPlace(pool.path, 0, shared=False))
        modes = {name: Mode(config(*mode), Coordinator(engines, OneTurn(), config(*mode), runtime.client), lengths)
                 for name, mode in MODES.items()}
        with published(str(tmp_path)) as manifest:
            for step in range(3):
                for mode in modes.values():
                    for engine in engines:
                        engine.component.update_weights(manifest, step - 1)
                    mode.step(step)
    for mode in modes.values():
        generated = sum(statistics.generated_tokens for statistics in mode.statistics)
        dropped = sum(metrics["partial/wasted_tokens"] for metrics in mode.metrics)
        waiting = sum(group.generated for group in mode.stream.carried)
        assert generated == sum(map(sum, mode.trained)) + dropped + waiting
    assert summary(modes)["partial_synchronous"]["relative"] == 1

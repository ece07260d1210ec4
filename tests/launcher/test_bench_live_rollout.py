from __future__ import annotations

import pytest

from launcher.bench import live_rollout
from launcher.bench.live_rollout import OneTurn, config, save_model, start_engines, summary
from megatron_pbsd.controller.inline import InlineRuntime
from megatron_pbsd.environments.protocol import Task
from megatron_pbsd.resharding.shared_folder import SharedFolder
from megatron_pbsd.rollout.coordinator import CollectStatistics, Coordinator, RolloutRequest
from megatron_pbsd.rollout.engines.embedded.kv_pool import PoolPlace


def test_trajectories_end_where_they_should_under_every_policy(tmp_path):
    lengths = {f"{step}/{group}/{i}": 1 + 17 * i + 70 * group for step in range(2) for group in range(2)
               for i in range(3)}
    asked = [RolloutRequest(str(group), Task(str(group), "", ("",), 1), 3, "") for group in range(2)]
    save_model(str(tmp_path))
    with SharedFolder() as pool:
        runtime = InlineRuntime()
        engines = start_engines(runtime, str(tmp_path), lengths=lengths, step_s=0.0,
                                kv_pool=PoolPlace(pool.path, 2**24, shared=True))
        for step, policy in enumerate(("context_aware", "group_pinned")):
            coordinator = Coordinator(engines, OneTurn(), config(policy), runtime.client)
            groups = coordinator.collect(asked, step=step, seed=0, temperature=1.0)
            assert {t.trajectory_id: t.generated for g in groups for t in g.trajectories} == {
                name: tokens for name, tokens in lengths.items() if name.startswith(f"{step}/")}


def test_speedups_are_over_the_baseline():
    def runs(*rounds):
        return [CollectStatistics(1, 1, 1, 0, 0, seconds, 0.5, engine_steps=steps) for steps, seconds in rounds]

    measured = {policy: runs((50, 1.0), (150, 3.0)) for policy in live_rollout.POLICIES}
    measured["group_pinned"] = runs((200, 4.0), (100, 5.0))
    paced = {policy: runs((0, 2.0)) for policy in live_rollout.PACED} | {"group_pinned": runs((0, 3.0))}
    numbers = summary(measured, paced, [{"a": 9, "b": 40}, {"a": 320, "b": 320, "c": 320, "d": 320, "e": 320}])
    assert numbers["live_speedup_steps"] == numbers["live_speedup_steps_longest_remaining"] == 1.5
    assert numbers["live_speedup_seconds"] == pytest.approx(2.25)
    assert numbers["live_speedup_seconds_paced"] == numbers["live_speedup_seconds_paced_longest_remaining"] == 1.5
    assert "live_speedup_seconds_paced_divided" not in numbers
    assert numbers["live_bound_steps"] == (40 + 320) / 2
    assert numbers["live_group_pinned"]["seconds"] == 4.5

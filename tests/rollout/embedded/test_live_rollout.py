"""Whole rollouts over real engines: the same trajectories whatever the policy, and whoever dies."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import psutil
import pytest
from scripted_rollout import EchoEnvironment, requests

from megatron_pbsd.config import RolloutConfig
from megatron_pbsd.controller.failures import ComponentHung
from megatron_pbsd.controller.inline import InlineRuntime
from megatron_pbsd.resharding.shared_folder import SharedFolder
from megatron_pbsd.rollout.coordinator import Coordinator
from megatron_pbsd.rollout.engines.embedded.engine import EmbeddedEngine
from megatron_pbsd.rollout.engines.embedded.kv_pool import PoolPlace
from megatron_pbsd.rollout.engines.host import EngineHost
from megatron_pbsd.rollout.policies.longest_remaining import LongestRemaining
from megatron_pbsd.rollout.sink import read_trajectories

MB = 2**20
POLICIES = ("group_pinned", "least_loaded", "divided", "context_aware", "longest_remaining")


@pytest.fixture
def pool_folder():
    with SharedFolder() as folder:
        yield folder


def limits(policy="least_loaded", slots=3, **keys):
    return RolloutConfig(policy=policy, slots=slots, max_turns=3, max_turn_tokens=40, max_context=150, deadline_s=60,
                         **keys)


def spawn(runtime, folder, pool_folder, config, count=1, first=0):
    place = PoolPlace(pool_folder.path, config.kv_pool_mb * MB, shared=config.divides)
    return [runtime.spawn(f"engine-{i}", EngineHost, EmbeddedEngine, name=f"engine-{i}", model_path=str(folder),
                          slots=config.slots, max_context=config.max_context, kv_pool=place)
            for i in range(first, first + count)]


def collected(coordinator, asked, routed_experts=False, step=1):
    groups = coordinator.collect(asked, step=step, seed=5, temperature=1.0, routed_experts=routed_experts)
    return [t for group in groups for t in group.trajectories]


def assert_same(trajectories, expected):
    for one, other in zip(trajectories, expected, strict=True):
        assert (one.trajectory_id, one.continuation) == (other.trajectory_id, other.continuation)
        assert [turn.kind for turn in one.turns] == [turn.kind for turn in other.turns]
        for turn, wanted in zip(one.turns, other.turns, strict=True):
            np.testing.assert_allclose(turn.log_probs, wanted.log_probs, atol=1e-5)
        if other.routed_experts is not None:
            np.testing.assert_array_equal(one.routed_experts, other.routed_experts)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "deepseek_v3"])
def test_trajectories_are_the_same_under_any_policy(folders, family, pool_folder):
    asked, moved = requests(4, 3), 0
    runtime, alone = InlineRuntime(), limits(slots=12, kv_pool_mb=0)
    expected = collected(
        Coordinator(spawn(runtime, folders[family], pool_folder, alone), EchoEnvironment(), alone, runtime.client),
        asked, routed_experts=True)
    for policy in POLICIES if family == "qwen3" else POLICIES[-1:]:
        config = limits(policy, chunk_tokens=7 if policy not in ("group_pinned", "least_loaded") else None)
        coordinator = Coordinator(
            spawn(runtime, folders[family], pool_folder, config, 2), EchoEnvironment(), config, runtime.client)
        assert_same(collected(coordinator, asked, routed_experts=True), expected)
        statistics = coordinator.statistics()
        moved += statistics.kv.moved_in
        assert statistics.kv.moved_in == statistics.kv.moved_out
        assert statistics.kv.bytes == 0, "what is over is forgotten"
        assert not [path for path in Path(pool_folder.path).rglob("*") if path.is_file()]
        assert statistics.predicted_lengths == {} or policy in ("context_aware", "longest_remaining")
    assert moved, "nothing was ever moved: the test says nothing about moves"


def test_moved_kv_is_not_computed_again(folders, pool_folder):
    """Beside the same rollout without a pool."""
    runtime, asked, statistics = InlineRuntime(), requests(4, 3), {}
    for megabytes in (64, 0):
        config = limits("longest_remaining", chunk_tokens=6, kv_pool_mb=megabytes)
        coordinator = Coordinator(
            spawn(runtime, folders["qwen3"], pool_folder, config, 3), EchoEnvironment(), config, runtime.client)
        collected(coordinator, asked)
        statistics[megabytes] = coordinator.statistics()
    pooled, bare = statistics[64], statistics[0]
    assert pooled.moves == bare.moves > 0, "moves are the policy's"
    assert pooled.kv.moved_in_tokens > 0 and bare.kv.moved_in_tokens == 0
    # Contexts of 32 tokens or fewer are computed again.
    assert pooled.recomputed_tokens <= 32 * pooled.moves
    assert bare.recomputed_tokens > pooled.recomputed_tokens
    assert pooled.prefilled_tokens < bare.prefilled_tokens


def test_lengths_of_an_earlier_rollout_are_the_prior_of_the_next(folders, pool_folder):
    seen = []

    class Recording(Coordinator):
        def _make_policy(self, asked):
            policy = super()._make_policy(asked)
            seen.append({request.group_id: policy.lengths.estimate(request.group_id) for request in asked})
            return policy

    config, runtime, asked = limits("context_aware", chunk_tokens=8), InlineRuntime(), requests(3, 2)
    coordinator = Recording(
        spawn(runtime, folders["qwen3"], pool_folder, config, 2), EchoEnvironment(), config, runtime.client)
    first = collected(coordinator, asked)
    collected(coordinator, asked[:2] + requests(5, 2)[3:], step=2)
    assert set(seen[0].values()) == {config.most_generated}
    longest = {f"g{i}": max(t.generated for t in first if t.group_id == f"g{i}") for i in range(2)}
    assert seen[1] == longest | dict.fromkeys(("g3", "g4"), config.most_generated)
    assert coordinator.statistics().predicted_lengths["count"] > 0


def stop_with_parked(runtime, running, coordinator, pid, parked, least):
    """Stop the engine in the middle of the rollout, when at least so many files of KV are `parked`: their names."""
    while True:
        assert not runtime.wait([running], timeout=0.01)[0], "it was over too soon"
        if runtime.result(coordinator.observe("progress")).tokens < 300:
            continue
        os.kill(pid, signal.SIGSTOP)
        while psutil.Process(pid).status() != psutil.STATUS_STOPPED:
            pass
        if len(names := set(os.listdir(parked))) >= least:
            return names
        os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize(("policy", "fate"), [
    pytest.param("least_loaded", "dies", marks=pytest.mark.slow),
    ("longest_remaining", "dies"), pytest.param("longest_remaining", "hangs", marks=pytest.mark.slow)])
def test_an_engine_that_is_lost_costs_no_finished_chunk(ray_runtime, folders, pool_folder, tmp_path, policy, fate):
    """SIGKILL, or SIGSTOP for longer than the deadline, in the middle of a rollout. It ends as an undisturbed one, and
    a further rollout does without."""
    asked, quiet = requests(12, 4), InlineRuntime()
    config = limits(policy, slots=4, chunk_tokens=8 if policy == "longest_remaining" else None)
    if fate == "hangs":
        config = config.model_copy(update={"deadline_s": 5.0})
    undisturbed = Coordinator(
        spawn(quiet, folders["qwen3"], pool_folder, config), EchoEnvironment(), config, quiet.client)
    expected = collected(undisturbed, asked)
    handles = spawn(ray_runtime, folders["qwen3"], pool_folder, config, 2, first=1)
    coordinator = ray_runtime.spawn(
        "coordinator", Coordinator, handles, EchoEnvironment(), config, ray_runtime.client)
    for handle in (*handles, coordinator):
        ray_runtime.result(handle.ready())
    import ray

    victim = ray.get(handles[0].pid)
    running = coordinator.call("collect", asked, step=1, seed=5, temperature=1.0, sink=str(tmp_path / "sink.jsonl"))
    parked = Path(pool_folder.path) / "engine-1"
    left = stop_with_parked(ray_runtime, running, coordinator, victim, parked, 3 if config.divides else 0)
    if fate == "dies":
        os.kill(victim, signal.SIGKILL)
    trajectories = [t for group in ray_runtime.result(running) for t in group.trajectories]
    assert_same(trajectories, expected)
    kept = read_trajectories(tmp_path / "sink.jsonl")
    assert sorted(t.trajectory_id for t in kept) == sorted(t.trajectory_id for t in expected)
    statistics = ray_runtime.result(coordinator.call("statistics"))
    (death,) = statistics.deaths
    assert death.name == "engine-1" and not psutil.pid_exists(victim)
    assert isinstance(death, ComponentHung) == (fate == "hangs")
    (death,) = ray_runtime.result(coordinator.observe("progress")).deaths
    assert death.name == "engine-1"
    if config.divides:
        assert left - set(os.listdir(parked)), "nothing that the lost engine had parked was taken"
    # The next rollout has one engine, until another takes the dead one's place.
    again = ray_runtime.result(coordinator.call("collect", asked[:2], step=1, seed=5, temperature=1.0))
    assert_same([t for group in again for t in group.trajectories], expected[:8])
    assert ray_runtime.result(coordinator.call("statistics")).deaths == ()
    (other,) = spawn(ray_runtime, folders["qwen3"], pool_folder, config, first=1)
    ray_runtime.result(other.ready())
    ray_runtime.result(coordinator.observe("join", other))
    again = ray_runtime.result(coordinator.call("collect", asked[:2], step=1, seed=5, temperature=1.0))
    assert_same([t for group in again for t in group.trajectories], expected[:8])
    assert {span.engine for span in ray_runtime.result(coordinator.call("statistics")).spans} == {
        "engine-1", "engine-2"}


class Meddling(EchoEnvironment):
    """Lets engines join and leave after so many turns."""

    def __init__(self):
        super().__init__()
        object.__setattr__(self, "turns", 0)
        object.__setattr__(self, "coordinator", None)
        object.__setattr__(self, "plans", {})

    def reply(self, task, turns, tokens):
        object.__setattr__(self, "turns", self.turns + 1)
        if plan := self.plans.pop(self.turns, None):
            plan(self.coordinator)
        return super().reply(task, turns, tokens)


def test_engines_join_and_leave_during_a_rollout(folders, pool_folder):
    runtime, asked = InlineRuntime(), requests(5, 4)
    config = limits("longest_remaining", chunk_tokens=7)
    first, second = spawn(runtime, folders["qwen3"], pool_folder, config, 2)
    expected = collected(Coordinator(
        spawn(runtime, folders["qwen3"], pool_folder, config, first=5), EchoEnvironment(), config, runtime.client),
        asked)
    environment = Meddling()
    coordinator = Coordinator([first], environment, config, runtime.client)
    object.__setattr__(environment, "coordinator", coordinator)
    environment.plans |= {5: lambda c: c.join(second), 15: lambda c: c.leave("engine-0")}
    assert_same(collected(coordinator, asked), expected)
    done = {handle.name: runtime.result(handle.call("statistics")).generated_tokens for handle in (first, second)}
    assert all(done.values()) and sum(done.values()) == sum(t.generated for t in expected)
    assert {span.engine for span in coordinator.statistics().spans} == {"engine-0", "engine-1"}
    # The rest of the rollouts is the second's alone.
    assert_same(collected(coordinator, asked[:1]), expected[:4])
    assert {span.engine for span in coordinator.statistics().spans} == {"engine-1"}


def test_the_configured_policy_is_the_default(folders, pool_folder):
    config = limits("longest_remaining", chunk_tokens=7)
    runtime = InlineRuntime()
    coordinator = Coordinator(
        spawn(runtime, folders["qwen3"], pool_folder, config), EchoEnvironment(), config, runtime.client)
    policy = coordinator._make_policy(requests(2, 1))
    assert isinstance(policy, LongestRemaining) and policy.chunk_tokens == 7

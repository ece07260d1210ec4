import json

import pytest
from scripted_rollout import EchoEnvironment, ScriptedEngine, expected, requests

from megatron_pbsd.config import RolloutConfig
from megatron_pbsd.controller.runtime import ComponentDied, DeadlineExpired
from megatron_pbsd.rollout.coordinator import Coordinator, EngineHost
from megatron_pbsd.trajectory import Trajectory

LIMITS = RolloutConfig(slots=3, max_turns=4, max_turn_tokens=10, max_context=60, deadline_s=60)


def engine(runtime, name: str, **arguments):
    return runtime.spawn(name, EngineHost, ScriptedEngine, name=name, **arguments)


def engines(runtime, count: int):
    return [engine(runtime, f"engine-{i}") for i in range(count)]


def wanted(asked, prefix="1", seed=5) -> list[list[Trajectory]]:
    return [[expected(request, f"{prefix}/{g}/{i}", seed, LIMITS) for i in range(request.samples)]
            for g, request in enumerate(asked)]


def members(groups) -> list[list[Trajectory]]:
    return [list(group.trajectories) for group in groups]


def read(sink) -> dict[str, Trajectory]:
    found = [Trajectory.from_json(json.loads(line)) for line in sink.read_text().splitlines()]
    assert len({t.trajectory_id for t in found}) == len(found)
    return {t.trajectory_id: t for t in found}


@pytest.mark.parametrize("count", [1, 3])
def test_trajectories_are_the_same_on_any_engines(runtime, tmp_path, count):
    asked, sink = requests(5, 3), tmp_path / "sink.jsonl"
    coordinator = Coordinator(engines(runtime, count), EchoEnvironment, LIMITS)
    groups, metrics = coordinator.collect(asked, "1", 5, 1.0, sink)
    assert members(groups) == wanted(asked)
    assert read(sink) == {t.trajectory_id: t for group in wanted(asked) for t in group}
    assert metrics["rollout/tokens"] == sum(t.generated for group in wanted(asked) for t in group)
    assert 0 <= metrics["rollout/engine_idle"] <= 1
    again, _ = coordinator.collect(asked, "2", 6, 1.0, sink)
    assert members(again) == wanted(asked, "2", 6)


def test_no_engine_runs_more_than_its_slots_and_all_kv_is_released(runtime, tmp_path):
    handles = engines(runtime, 2)
    Coordinator(handles, EchoEnvironment, LIMITS).collect(requests(6, 4), "1", 5, 1.0, tmp_path / "sink.jsonl")
    for handle in handles:
        statistics = handle.call("statistics").result()
        assert statistics.decode_steps == LIMITS.slots  # where the scripted engine says how many it ran at most
        assert statistics.cached_requests == 0


def test_a_coordinator_may_be_a_component_and_says_how_far_it_is(runtime, tmp_path):
    asked = requests(3, 2)
    handle = runtime.spawn("coordinator", Coordinator, engines(runtime, 2), EchoEnvironment, LIMITS, threads=2)
    running = handle.call("collect", asked, "1", 5, 1.0, tmp_path / "sink.jsonl")
    assert handle.call("progress").result()[0] <= 6
    assert members(running.result()[0]) == wanted(asked)
    assert handle.call("progress").result() == (6, 6)


@pytest.mark.parametrize("remote", [False, True])
def test_an_engines_death_is_named_and_what_was_finished_is_kept(ray_runtime, tmp_path, remote):
    sink, asked = tmp_path / "sink.jsonl", requests(6, 4)
    handles = [*engines(ray_runtime, 1), engine(ray_runtime, "engine-doomed", crash_after=60)]
    with pytest.raises(ComponentDied, match="(?s)^engine-doomed died: .*engine-doomed runs into its scripted end"):
        if remote:
            coordinator = ray_runtime.spawn("coordinator", Coordinator, handles, EchoEnvironment, LIMITS, threads=2)
            coordinator.call("collect", asked, "1", 5, 1.0, sink).result()
        else:
            Coordinator(handles, EchoEnvironment, LIMITS).collect(asked, "1", 5, 1.0, sink)
    known = {t.trajectory_id: t for group in wanted(asked) for t in group}
    kept = read(sink)
    assert 0 < len(kept) < len(known)
    assert all(known[name] == trajectory for name, trajectory in kept.items())


def test_a_hung_engine_is_named_with_its_stack_while_others_work(ray_runtime, tmp_path):
    limits = LIMITS.model_copy(update={"deadline_s": 1.0})
    handles = [*engines(ray_runtime, 1), engine(ray_runtime, "engine-hung", hang_after=40)]
    for handle in handles:
        handle.call("statistics").result()
    with pytest.raises(DeadlineExpired) as expired:
        Coordinator(handles, EchoEnvironment, limits).collect(requests(6, 4), "1", 5, 1.0, tmp_path / "sink.jsonl")
    assert "no finished chunk from engine-hung within rollout.deadline_s = 1\n" in str(expired.value)
    assert "in collect" in str(expired.value)

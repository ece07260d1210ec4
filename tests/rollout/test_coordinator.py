from dataclasses import replace
from functools import partial

import psutil
import pytest
from scripted_rollout import EchoEnvironment, ScriptedEngine, chosen_experts, expected, requests

from megatron_pbsd.config import RolloutConfig
from megatron_pbsd.controller.failures import ComponentDied, ComponentHung, DeadlineExpired
from megatron_pbsd.controller.inline import InlineRuntime
from megatron_pbsd.rollout.coordinator import Coordinator, Progress, summarised
from megatron_pbsd.rollout.engine_group import EngineGroup
from megatron_pbsd.rollout.engines.host import EngineHost
from megatron_pbsd.rollout.engines.protocol import EngineStatistics, KVCounters
from megatron_pbsd.rollout.errors import RolloutError
from megatron_pbsd.rollout.length_context import LengthContext
from megatron_pbsd.rollout.length_model import LengthModel
from megatron_pbsd.rollout.policies.context_aware import ContextAware
from megatron_pbsd.rollout.policies.divided import Divided
from megatron_pbsd.rollout.policies.group_pinned import GroupPinned
from megatron_pbsd.rollout.policies.least_loaded import LeastLoaded
from megatron_pbsd.rollout.policies.longest_remaining import LongestRemaining
from megatron_pbsd.rollout.sink import read_trajectories

LIMITS = RolloutConfig(slots=3, max_turns=4, max_turn_tokens=10, max_context=60, deadline_s=60)


def engines(runtime, count: int, **arguments):
    return [runtime.spawn(f"engine-{i}", EngineHost, ScriptedEngine, name=f"engine-{i}", **arguments)
            for i in range(count)]


def wanted(asked, step=1, seed=5):
    return [[expected(r, sample, step, seed, LIMITS) for sample in range(r.samples)] for r in asked]


def collected(groups):
    return [list(group.trajectories) for group in groups]


@pytest.mark.parametrize(("count", "chunk_tokens"), [(1, 99), (3, 99), (2, 3)])
def test_trajectories_are_the_same_on_any_engines(runtime, count, chunk_tokens):
    asked = requests(5, 3)
    coordinator = Coordinator(engines(runtime, count, chunk_tokens=chunk_tokens), EchoEnvironment(), LIMITS,
                              runtime.client, partial(LeastLoaded, spread=1))
    assert collected(coordinator.collect(asked, step=1, seed=5, temperature=1.0)) == wanted(asked)
    assert collected(coordinator.collect(asked, step=2, seed=6, temperature=1.0)) == wanted(asked, 2, 6)


@pytest.mark.parametrize("policy", [
    GroupPinned, partial(Divided, 3), lambda: ContextAware(3, LengthContext(40)),
    lambda: LongestRemaining(3, LengthModel(40))])
def test_trajectories_are_the_same_under_any_policy(policy):
    """Division in chunks of 3 tokens included."""
    asked, runtime = requests(5, 3), InlineRuntime()
    coordinator = Coordinator(engines(runtime, 2), EchoEnvironment(), LIMITS, runtime.client, policy)
    assert collected(coordinator.collect(asked, step=1, seed=5, temperature=1.0)) == wanted(asked)
    assert collected(coordinator.collect(asked, step=2, seed=6, temperature=1.0)) == wanted(asked, 2, 6)


@pytest.mark.parametrize("chunk_tokens", [99, 3])
def test_routed_experts_travel_to_the_trajectory_and_its_file(runtime, chunk_tokens, tmp_path):
    asked, sink = requests(4, 2), tmp_path / "sink.jsonl"
    coordinator = Coordinator(engines(runtime, 2, chunk_tokens=chunk_tokens), EchoEnvironment(), LIMITS,
                              runtime.client, partial(LeastLoaded, spread=1))
    groups = coordinator.collect(asked, step=1, seed=5, temperature=1.0, sink=sink, routed_experts=True)
    for got, bare in zip(collected(groups), wanted(asked), strict=True):
        for trajectory, plain in zip(got, bare, strict=True):
            experts = chosen_experts(plain.prompt + plain.continuation)
            experts[-1] = -1
            assert trajectory == replace(plain, routed_experts=experts) and trajectory != plain
    kept = {t.trajectory_id: t for t in read_trajectories(sink)}
    assert kept == {t.trajectory_id: t for group in groups for t in group.trajectories}


def test_slots_kv_and_statistics(runtime):
    handles = engines(runtime, 2)
    coordinator = Coordinator(handles, EchoEnvironment(), LIMITS, runtime.client)
    groups = coordinator.collect(requests(6, 4), step=1, seed=5, temperature=1.0)
    for handle in handles:
        statistics = runtime.result(handle.call("statistics"))
        assert statistics.decode_steps <= LIMITS.slots  # the scripted engine reports here how many it ever ran at once
        assert statistics.cached_requests == 0
    statistics = coordinator.statistics()
    assert statistics.trajectories == 24
    assert statistics.turns == sum(len(t.turns) for group in groups for t in group.trajectories)
    assert statistics.generated_tokens == sum(t.generated for group in groups for t in group.trajectories)
    assert statistics.cached_tokens == statistics.turns - 24  # it counts hits: every turn after the first
    assert 0 <= statistics.engine_idle_share <= 1 and statistics.tokens_per_second > 0


def test_a_coordinator_may_be_a_component_and_reports_progress(runtime, tmp_path):
    asked = requests(3, 2)
    handle = runtime.spawn("coordinator", Coordinator, engines(runtime, 2), EchoEnvironment(), LIMITS, runtime.client)
    running = handle.call("collect", asked, step=1, seed=5, temperature=1.0, sink=str(tmp_path / "sink.jsonl"))
    assert runtime.result(handle.observe("progress")).finished <= 6
    groups = runtime.result(running)
    assert collected(groups) == wanted(asked)
    tokens = sum(t.generated for group in groups for t in group.trajectories)
    assert runtime.result(handle.observe("progress")) == Progress(6, 6, tokens)
    kept = {t.trajectory_id: t for t in read_trajectories(tmp_path / "sink.jsonl")}
    assert kept == {t.trajectory_id: t for group in groups for t in group.trajectories}


def doomed(runtime):
    return runtime.spawn("engine-doomed", EngineHost, ScriptedEngine, name="engine-doomed", crash_after=60)


def test_without_an_engine_that_died_the_rollout_goes_on(ray_runtime, tmp_path):
    sink, asked = tmp_path / "sink.jsonl", requests(6, 4)
    coordinator = Coordinator([*engines(ray_runtime, 1), doomed(ray_runtime)], EchoEnvironment(), LIMITS,
                              ray_runtime.client)
    assert collected(coordinator.collect(asked, step=1, seed=5, temperature=1.0, sink=sink)) == wanted(asked)
    (death,) = coordinator.statistics().deaths
    assert death.name == "engine-doomed" and "engine-doomed runs into its scripted end" in death.last_lines
    assert coordinator.progress().deaths == (death,)
    assert len(read_trajectories(sink)) == 24
    # The next one begins without it.
    assert collected(coordinator.collect(asked, step=1, seed=5, temperature=1.0)) == wanted(asked)
    assert coordinator.statistics().deaths == () and coordinator.progress().deaths == (death,)


def test_the_last_engines_death_is_named_and_what_was_finished_is_kept(ray_runtime, tmp_path):
    sink, asked = tmp_path / "sink.jsonl", requests(6, 4)
    coordinator = Coordinator([doomed(ray_runtime)], EchoEnvironment(), LIMITS, ray_runtime.client)
    with pytest.raises(ComponentDied) as died:
        coordinator.collect(asked, step=1, seed=5, temperature=1.0, sink=sink)
    assert died.value.name == "engine-doomed"
    assert "engine-doomed runs into its scripted end" in died.value.last_lines
    kept = read_trajectories(sink)
    assert len(kept) == coordinator.progress().finished > 0
    known = {t.trajectory_id: t for group in wanted(asked) for t in group}
    assert all(known[t.trajectory_id] == t for t in kept)


def test_a_torn_last_line_is_left_out(tmp_path):
    sink = tmp_path / "sink.jsonl"
    trajectory = expected(requests(1, 1)[0], 0, 1, 5, LIMITS)
    from megatron_pbsd.rollout.sink import TrajectorySink

    with TrajectorySink(sink) as writer:
        writer.write(trajectory)
    whole = sink.read_text()
    sink.write_text(whole + whole[: len(whole) // 2])
    assert read_trajectories(sink) == [trajectory]


def hanging(runtime, name, **arguments):
    """It has been started, so that no deadline has to last that long."""
    handle = runtime.spawn(name, EngineHost, ScriptedEngine, name=name, **arguments)
    runtime.result(handle.ready())
    return handle


def assert_ended(handle):
    import ray

    assert not psutil.pid_exists(ray.get(handle.pid))


def test_without_an_engine_that_hung_the_rollout_goes_on(ray_runtime):
    limits, asked = LIMITS.model_copy(update={"deadline_s": 1.0}), requests(6, 4)
    hung, well = hanging(ray_runtime, "engine-hung", hang_after=40), hanging(ray_runtime, "engine-well")
    coordinator = Coordinator([hung, well], EchoEnvironment(), limits, ray_runtime.client)
    assert collected(coordinator.collect(asked, step=1, seed=5, temperature=1.0)) == wanted(asked)
    (death,) = coordinator.statistics().deaths
    assert death.name == "engine-hung" and death.deadline_s == 1.0
    assert death.cause == "it hung, with no answer for 1 s in phase 'rollout', and was ended"
    assert "in collect" in death.stacks and "scripted_rollout.py" in death.stacks
    assert_ended(hung)


def test_the_last_engine_that_hangs_ends_the_rollout_with_its_stack(ray_runtime):
    hung = hanging(ray_runtime, "engine-hung", hang_after=40)
    coordinator = Coordinator(
        [hung], EchoEnvironment(), LIMITS.model_copy(update={"deadline_s": 1.0}), ray_runtime.client)
    with pytest.raises(DeadlineExpired) as expired:
        coordinator.collect(requests(6, 4), step=1, seed=5, temperature=1.0)
    assert expired.value.missing == ("engine-hung",)
    assert "no answer within 1 s from engine-hung" in str(expired.value)
    assert "in collect" in str(expired.value) and "scripted_rollout.py" in str(expired.value)
    assert coordinator.progress().finished > 0
    assert_ended(hung)


def test_an_engine_that_hangs_over_its_statistics_is_left_out(ray_runtime):
    limits, asked = LIMITS.model_copy(update={"deadline_s": 1.0}), requests(2, 2)
    handles = [hanging(ray_runtime, "engine-mute", hang_over="statistics"), hanging(ray_runtime, "engine-well")]
    coordinator = Coordinator(handles, EchoEnvironment(), limits, ray_runtime.client)
    assert collected(coordinator.collect(asked, step=1, seed=5, temperature=1.0)) == wanted(asked)
    assert [death.phase for death in coordinator.statistics().deaths] == ["rollout.statistics"]
    assert_ended(handles[0])


def test_engines_that_hang_between_rollouts_are_ended(ray_runtime):
    """So that they die of it, and may be started anew."""
    handles = [hanging(ray_runtime, f"engine-{i}", hang_over="update_weights" if i != 1 else None) for i in range(3)]
    group = EngineGroup(ray_runtime, handles, deadline_s=1.0)
    with pytest.raises(ComponentHung, match="'engines.update_weights': no answer within 1 s from engine-0\n") as hung:
        group.call("update_weights", None, 1)
    assert "engine-2 is at" in hung.value.stacks
    for handle in (handles[0], handles[2]):
        assert_ended(handle)
    assert ray_runtime.result(handles[1].call("statistics")).version == 1
    # Who finds them dead later hears why.
    with pytest.raises(ComponentHung, match=r"engine-[02] was ended$"):
        group.call("update_weights", None, 1)


def test_an_error_in_the_environment_is_raised_as_it_is(runtime):
    class Broken(EchoEnvironment):
        def reply(self, task, turns, tokens):
            raise LookupError(f"no answer to {task.task_id}")

    coordinator = Coordinator(engines(runtime, 1), Broken(), LIMITS, runtime.client)
    with pytest.raises(LookupError, match="no answer to train-0"):
        coordinator.collect(requests(1, 1), step=1, seed=5, temperature=1.0)


def test_group_ids_must_differ(runtime):
    coordinator = Coordinator(engines(runtime, 1), EchoEnvironment(), LIMITS, runtime.client)
    with pytest.raises(RolloutError, match=r"repeated are \['g0'\]"):
        coordinator.collect(requests(1, 1) * 2, step=1, seed=5, temperature=1.0)


def test_what_was_finished_before_is_not_generated_again(runtime, tmp_path):
    asked, sink = requests(4, 3), tmp_path / "sink.jsonl"
    handles = engines(runtime, 2)
    coordinator = Coordinator(handles, EchoEnvironment(), LIMITS, runtime.client)
    whole = [t for group in wanted(asked) for t in group]
    stranger = replace(whole[5], prompt=(9, *whole[5].prompt))
    groups = coordinator.collect(
        asked, step=1, seed=5, temperature=1.0, sink=sink, finished=[*whole[:5], stranger, *wanted(asked, step=2)[0]])
    assert collected(groups) == wanted(asked)
    assert {t.trajectory_id for t in read_trajectories(sink)} == {t.trajectory_id for t in whole[5:]}
    statistics, generated = coordinator.statistics(), sum(t.generated for t in whole[5:])
    assert (statistics.taken_up, statistics.trajectories) == (5, 12)
    assert sum(runtime.result(handle.call("statistics")).generated_tokens for handle in handles) == generated
    assert statistics.tokens_per_second == pytest.approx(generated / statistics.wall_seconds)
    assert coordinator.progress().finished == coordinator.progress().total == 12
    # All of it may have been finished.
    assert collected(coordinator.collect(asked, step=1, seed=5, temperature=1.0, finished=whole)) == wanted(asked)
    assert coordinator.statistics().tokens_per_second == 0


@pytest.mark.parametrize(("name", "cause"), [
    ("engine-9", r"engines \['engine-9'\] cannot leave: those that are there are \['engine-0'\]"),
    ("engine-0", "no engine is left for 6 unfinished trajectories")])
def test_engines_that_cannot_leave(name, cause):
    runtime = InlineRuntime()
    coordinator = Coordinator(engines(runtime, 1), EchoEnvironment(), LIMITS, runtime.client)
    coordinator.leave(name)
    with pytest.raises(RolloutError, match=cause):
        coordinator.collect(requests(2, 3), step=1, seed=5, temperature=1.0)


def test_statistics_of_a_rollout():
    """Of two engines one of which has started in between, beside one that is gone."""
    asked, runtime = requests(4, 5), InlineRuntime()
    coordinator = Coordinator(engines(runtime, 2), EchoEnvironment(), LIMITS, runtime.client)
    coordinator.collect(asked, step=1, seed=5, temperature=1.0)
    statistics = coordinator.statistics()
    assert 0 <= statistics.tail_seconds <= statistics.wall_seconds
    assert {span.engine for span in statistics.spans} == {"engine-0", "engine-1"}
    assert all(span.start_ns < span.end_ns and span.chunks > 0 for span in statistics.spans)

    def counted(tokens, steps, busy, **kv):
        return EngineStatistics(0, 0, 0, 0, tokens, tokens, 0, steps, busy, 0, KVCounters(**kv))

    before = {"old": counted(100, 10, 1.0, moved_in=3, bytes=7), "gone": counted(5, 5, 5.0)}
    after = {"old": counted(150, 30, 2.0, moved_in=5, bytes=9), "new": counted(40, 15, 0.5, moved_in=1, bytes=2)}
    summary = summarised([], before, after, wall_seconds=2.0)
    assert (summary.prefilled_tokens, summary.engine_steps) == (90, 20)
    assert summary.engine_idle_share == pytest.approx(1 - 1.5 / 4)
    assert (summary.kv.moved_in, summary.kv.bytes) == (3, 11)

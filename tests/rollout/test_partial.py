"""Over-sampling, early stop and carrying: nothing lost, nothing twice, nothing older than allowed."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings, strategies as st
from scripted_rollout import EchoEnvironment, ScriptedEngine, chosen_experts, expected, requests as asked_for

from megatron_pbsd import prompts, staleness
from megatron_pbsd.config import RunConfig
from megatron_pbsd.controller.inline import InlineRuntime
from megatron_pbsd.prompts import Stream
from megatron_pbsd.rollout.coordinator import Coordinator
from megatron_pbsd.rollout.engines.host import EngineHost
from megatron_pbsd.rollout.errors import RolloutError
from megatron_pbsd.rollout.length_context import LengthContext
from megatron_pbsd.rollout.length_model import LengthModel
from megatron_pbsd.rollout.policies.context_aware import ContextAware
from megatron_pbsd.rollout.policies.first import First
from megatron_pbsd.rollout.policies.least_loaded import LeastLoaded
from megatron_pbsd.rollout.policies.longest_remaining import LongestRemaining
from megatron_pbsd.rollout.quota import Quota, due
from megatron_pbsd.rollout.request import Started, Unfinished
from megatron_pbsd.rollout.scheduler import Scheduler
from megatron_pbsd.rollout.sink import read_trajectories
from megatron_pbsd.rollout.survival import Seen
from megatron_pbsd.trajectory import Group, Trajectory, VersionSpan, trajectories_of


@given(st.lists(st.integers(0, 3), max_size=8), st.integers(0, 9), st.sets(st.integers(0, 7)), st.randoms())
def test_a_quota_is_reached_when_enough_are_complete_and_all_that_are_due(missing, wanted, due_numbers, random):
    left = {f"g{i}": count for i, count in enumerate(missing)}
    must = {f"g{i}" for i in due_numbers if i < len(missing)}
    quota = Quota(left, wanted, must)
    events = [name for name, count in left.items() for _ in range(count)]
    random.shuffle(events)
    for name in [None, *events]:
        if name is not None:
            quota.finished(name)
            left[name] -= 1
        complete = [group for group, count in left.items() if not count]
        assert quota.reached == (len(complete) >= min(wanted, len(left)) and must <= set(complete))
        chosen = quota.chosen
        assert must & set(complete) <= chosen <= set(complete)
        others = [group for group in complete if group not in must]
        assert [group for group in others if group in chosen] == others[: max(0, wanted - len(must & set(complete)))]
    assert quota.reached and Quota(left).reached


@pytest.mark.parametrize("policy", [
    LeastLoaded, lambda: ContextAware(4, LengthContext(40)), lambda: LongestRemaining(4, LengthModel(40))])
def test_carried_groups_go_before_new_ones_chunk_after_chunk(policy):
    scheduler = Scheduler(First(policy(), ["old", "older"]))
    scheduler.engine_joined("engine", 1)
    for name, group in [("n1", "new"), ("n2", "new"), ("o1", "older"), ("o2", "old"), ("o3", "old"), ("n3", "newer")]:
        scheduler.submitted(name, group, 5, 20)
    placed = []
    while len(placed) < 9 and (made := scheduler.decisions()):
        for assignment in made:
            placed.append(assignment.request_id)
            scheduler.chunk_finished(assignment.request_id, 4)
            if placed.count(assignment.request_id) < 2:
                scheduler.submitted(assignment.request_id, "", 9, 16)
            else:
                scheduler.request_finished(assignment.request_id)
    assert placed[:6] == ["o1", "o1", "o2", "o2", "o3", "o3"] and placed[6][0] == "n"


def config(rollout, runs="runs"):
    return RunConfig.model_validate({
        "name": "n", "runs": runs, "steps": 9, "seed": 5, "model": {"path": "m"}, "algorithm": {"name": "grpo"},
        "learner": {"updates_per_step": 1},
        "rollout": {"slots": 3, "group_size": 3, "prompts_per_step": 2, "max_turns": 4, "max_turn_tokens": 10,
                    "max_context": 60, "deadline_s": 60, **rollout}})


class Driver:
    """The rollouts of a training loop. through_json: the stream is saved and read between steps."""

    def __init__(self, runtime, settings, engines=2, engine=ScriptedEngine, **arguments):
        self.runtime, self.config, self.environment = runtime, settings, EchoEnvironment()
        self.handles = [runtime.spawn(f"engine-{i}", EngineHost, engine, name=f"engine-{i}", **arguments)
                        for i in range(engines)]
        self.coordinator = self.new_coordinator()
        self.stream, self.trained, self.asked = Stream(), [], []

    def new_coordinator(self):
        return Coordinator(self.handles, self.environment, self.config.rollout, self.runtime.client)

    def step(self, step, **arguments):
        """The groups of a step, and what it left."""
        for handle in self.handles:
            self.runtime.result(handle.call("update_weights", None, step - 1))
        tasks, rollout = self.environment.tasks("train"), self.config.rollout
        new = prompts.requests(self.environment, tasks, self.config, self.stream)
        groups = self.coordinator.collect(
            new, step=step, seed=5, temperature=1.0, carried=self.stream.carried,
            wanted=rollout.prompts_per_step if rollout.over_sampling > 1 else None, **arguments)
        self.asked += [(step, request) for request in new]
        self.trained.append(groups)
        return groups, self.coordinator.left()

    def go_on(self, left):
        stream = self.stream.after(self.config, left)
        saved = json.loads(json.dumps([group.to_json() for group in stream.carried]))
        self.stream = Stream(stream.asked, tuple(map(Started.from_json, saved)))
        assert self.stream == stream


@settings(max_examples=30)
@given(st.floats(1, 3), st.integers(0, 3), st.integers(1, 3), st.integers(2, 4), st.integers(1, 5), st.booleans(),
       st.sampled_from(["least_loaded", "group_pinned", "longest_remaining", "context_aware"]))
def test_every_trajectory_is_trained_once_or_carried(over, bound, per_step, size, slots, routed, policy):
    over = 1.0 + (over - 1) * (bound == 0 or over > 1.01)
    bound = bound if over > 1 else 0
    driver = Driver(InlineRuntime(), config({
        "over_sampling": over, "max_staleness": bound, "prompts_per_step": per_step, "group_size": size, "slots": slots,
        "policy": policy}))
    in_flight, dropped = driver.config.rollout.prompts_in_flight, 0
    for step in range(1, 6):
        carried = driver.stream.carried
        must = due(carried, step - 1, bound)
        groups, left = driver.step(step, routed_experts=routed)
        assert len(groups) == max(per_step, len(must)) and must <= {group.group_id for group in groups}
        assert len(groups) + len(left) == in_flight == len(carried) + len(driver.asked) - sum(
            1 for asked, _ in driver.asked if asked < step)
        staleness.check(groups, step - 1, bound)
        statistics = driver.coordinator.statistics()
        assert statistics.generated_tokens == sum(t.generated for t in trajectories_of(groups)) + sum(
            group.generated for group in left) - sum(group.generated for group in carried)
        metrics = staleness.metrics(
            driver.config.rollout, driver.stream, in_flight - len(carried), groups, left, step - 1)
        assert metrics["staleness/max"] <= bound
        assert metrics["partial/carried_groups"] == (len(left) if bound else 0)
        dropped += 0 if bound else len(left)
        for handle in driver.handles:
            assert driver.runtime.result(handle.call("statistics")).cached_requests == 0
        driver.go_on(left)
    whole = {t.trajectory_id: t for step, request in driver.asked for sample in range(size)
             for t in [expected(request, sample, step, 5, driver.config.rollout)]}
    trained = [t for groups in driver.trained for t in trajectories_of(groups)]
    assert max(Counter(t.trajectory_id for t in trained).values()) == 1
    carried = [m.trajectory_id for group in driver.stream.carried for m in group.members]
    assert len(trained) + len(carried) + dropped * size == len(whole)
    assert not set(carried) & {t.trajectory_id for t in trained}
    for trajectory in trained:
        wanted = whole[trajectory.trajectory_id]
        assert [(t.tokens, t.log_probs, t.observation, t.kind) for t in trajectory.turns] == [
            (t.tokens, t.log_probs, t.observation, t.kind) for t in wanted.turns]
        began = int(trajectory.trajectory_id.split("/")[0]) - 1
        versions = [span.version for turn in trajectory.turns for span in turn.versions]
        assert versions == sorted(versions) and began <= versions[0]
        if routed:
            experts = chosen_experts(wanted.prompt + wanted.continuation)
            experts[-1] = -1
            assert (trajectory.routed_experts == experts).all()


def test_without_over_sampling_everything_is_as_ever():
    driver = Driver(InlineRuntime(), config({}))
    for step in (1, 2):
        groups, left = driver.step(step)
        assert [group.group_id for group in groups] == ["0", "1"] and not left
        driver.go_on(left)
    assert driver.stream == Stream(4)


def test_a_step_stops_engines_that_are_at_work(ray_runtime):
    """In processes of their own: an engine that has not finished a chunk gives what there is of it."""
    driver = Driver(ray_runtime, config({"over_sampling": 2.0, "max_staleness": 2, "slots": 4}), slow_s=0.002)
    for step in range(1, 5):
        groups, left = driver.step(step)
        staleness.check(groups, step - 1, 2)
        assert len(groups) == 2 and len(left) == 2
        driver.go_on(left)
    trained = [t for groups in driver.trained for t in trajectories_of(groups)]
    whole = {t.trajectory_id: t for step, request in driver.asked for sample in range(3)
             for t in [expected(request, sample, step, 5, driver.config.rollout)]}
    assert all(t.continuation == whole[t.trajectory_id].continuation for t in trained)


def test_a_rollout_that_died_is_taken_up_with_what_it_carried(tmp_path):
    """What the sink has of carried and new groups is not generated again, and everything turns out the same."""
    driver = Driver(InlineRuntime(), config({"over_sampling": 2.0, "max_staleness": 1}))
    _, left = driver.step(1)
    driver.go_on(left)
    assert any(member.generated for group in driver.stream.carried for member in group.unfinished)
    sink = tmp_path / "sink.jsonl"
    groups, _ = driver.step(2, sink=sink)
    carried = {m.trajectory_id for group in driver.stream.carried for m in group.unfinished}
    lines = {json.loads(line)["trajectory_id"]: line for line in sink.read_text().splitlines(keepends=True)}
    assert carried < set(lines)
    sink.write_text(lines[min(carried)] + "".join([line for name, line in lines.items() if name not in carried][:2]))
    taken = read_trajectories(sink)
    driver.coordinator = driver.new_coordinator()
    again, _ = driver.step(2, sink=sink, finished=taken)
    statistics = driver.coordinator.statistics()
    assert statistics.taken_up == len(taken)
    prefixes = {m.trajectory_id: m.generated for group in driver.stream.carried for m in group.unfinished}
    assert statistics.taken_up_tokens == sum(t.generated - prefixes.get(t.trajectory_id, 0) for t in taken)
    known = {t.trajectory_id: t for t in trajectories_of(groups)}
    assert all(t == known[t.trajectory_id] for t in trajectories_of(again) if t.trajectory_id in known)
    assert {t.trajectory_id for t in taken}.isdisjoint(
        {t.trajectory_id for t in read_trajectories(sink)[len(taken):]})


def trajectory(name, *versions):
    from megatron_pbsd.trajectory import Turn

    spans = tuple(VersionSpan(version, 2 * i, 2 * i + 2) for i, version in enumerate(versions))
    count = 2 * len(versions)
    turn = Turn((5,) * count, (-1.0,) * count, (), "answer", "stop", spans)
    return Trajectory(name, name.split("/")[1], "t", (1,), (1,), (turn,))


def test_what_is_too_old_or_too_new_is_never_trained():
    groups = [Group("0", (trajectory("1/0/0", 3, 4), trajectory("1/0/1", 4))), Group("1", (trajectory("2/1/0", 5),))]
    staleness.check(groups[:1], 4, 1)
    staleness.check(groups, 5, 2)
    with pytest.raises(RolloutError, match=r"weights version 5 may train on tokens of versions 4 to 5 \(rollout."
                                           r"max_staleness = 1\), but 1/0/0 has tokens of versions \[3, 4\]$"):
        staleness.check(groups, 5, 1)
    with pytest.raises(RolloutError, match=r"but 1/0/0 .* \[3, 4\]; 2/1/0 has tokens of versions \[5\]$"):
        staleness.check(groups, 4, 0)


def test_metrics_of_a_step_count_what_was_carried_dropped_and_stale():
    request = asked_for(1, 2)[0]
    half = Unfinished(replace(trajectory("1/a/0"), turns=()), (5, 6, 7), (-1.0,) * 3, (VersionSpan(0, 0, 3),))
    carried = Started(replace(request, group_id="a"), (half, trajectory("1/a/1", 0)))
    left = Started(replace(request, group_id="b"), (
        Unfinished(replace(trajectory("2/b/0"), turns=()), (5,), (-1.0,), (VersionSpan(1, 0, 1),)),
        trajectory("2/b/1", 1, 1)))
    whole = Group("a", (trajectory("1/a/0", 0, 0, 1), trajectory("1/a/1", 0)))
    stream = Stream(3, (carried,))
    assert staleness.seen(stream.carried, [whole], [left]) == [Seen(3, 6, True), Seen(0, 1, False), Seen(0, 4, True)]
    carry = config({"over_sampling": 1.5, "max_staleness": 1}).rollout
    found = staleness.metrics(carry, stream, 1, [whole], [left], 1)
    assert found.items() >= {
        "partial/asked_groups": 1, "partial/taken_groups": 1, "partial/due_groups": 1, "partial/carried_groups": 1,
        "partial/dropped_groups": 0, "partial/wasted_tokens": 0, "staleness/mean": 1, "staleness/max": 1,
        "staleness/stale_tokens": 6 / 8, "length_bias/trained_mean": 4}.items()
    # At 4 tokens two are watched and one ends, at 6 the other does.
    assert found["length_bias/asked_mean"] == pytest.approx(4 + 0.5 * 2)
    drop = staleness.metrics(config({"over_sampling": 1.5}).rollout, Stream(), 2, [whole], [left], 1)
    assert (drop["partial/dropped_groups"], drop["partial/wasted_tokens"], drop["partial/carried_groups"]) == (1, 5, 0)


def test_room_that_has_gone_is_named():
    driver = Driver(InlineRuntime(), config({"over_sampling": 2.0, "max_staleness": 1}))
    _, left = driver.step(1)
    driver.go_on(left)
    driver.config = config({"over_sampling": 2.0, "max_staleness": 1, "max_turn_tokens": 1})
    driver.coordinator = driver.new_coordinator()
    with pytest.raises(RolloutError, match=r"trajectory '1/\d/\d', which an earlier step began, has no room to go on"):
        driver.step(2)

"""Whole runs that over-sample: each prompt is trained on once or waits, never by weights that are too new for it."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from pbsd_process import INLINE, SMALL

from megatron_pbsd.checkpointing.manifest import read_manifest
from megatron_pbsd.observability.records import read_trajectories
from megatron_pbsd.rollout.request import Started

GROUPS, SIZE, IN_FLIGHT = 4, 4, 6
CARRY = (*SMALL, "--rollout.over_sampling", "1.5", "--rollout.max_staleness", "1", "--checkpoint.every", "2",
         "--evaluation.every", "0", "--rollout.slots", "4")


def trained(run, steps):
    return {step: [recorded.trajectory for recorded in read_trajectories(run.folder, step)] for step in steps}


def carried(run, step):
    """The groups that the checkpoint of a step carries, and the number of prompts behind it."""
    checkpoint = run.folder / "checkpoints" / f"step_{step}"
    groups = [Started.from_json(data) for data in json.loads((checkpoint / "carried.json").read_text())]
    manifest = read_manifest(checkpoint)
    assert "carried.json" in manifest.files
    return groups, manifest.contents.position["prompts"]


def check(run, rows, steps):
    """Of steps 1 to `steps`, from the run's own records."""
    made = trained(run, range(1, steps + 1))
    assert all(len({t.group_id for t in members}) == GROUPS and len(members) == GROUPS * SIZE
               for members in made.values())
    for step, members in made.items():
        versions = [span.version for t in members for turn in t.turns for span in turn.versions]
        assert step - 2 <= min(versions) and max(versions) == step - 1
        behind = [step - 1 - min(span.version for turn in t.turns for span in turn.versions) for t in members]
        assert rows[step]["staleness/max"] == max(behind)
        assert rows[step]["staleness/mean"] == pytest.approx(sum(behind) / len(behind))
    waiting, asked = carried(run, steps)
    assert len(waiting) == IN_FLIGHT - GROUPS and asked == IN_FLIGHT + (steps - 1) * GROUPS
    names = [t.trajectory_id for members in made.values() for t in members]
    names += [m.trajectory_id for group in waiting for m in group.members]
    assert max(Counter(names).values()) == 1 and len(names) == asked * SIZE
    return made


def test_nothing_is_lost_and_nothing_is_trained_twice(pbsd):
    rows = check_rows(run := pbsd("carry", *CARRY, *INLINE, "--steps", "3", "--algorithm.name", "grpo"), 3)
    stale = [row["staleness/stale_tokens"] for row in rows[1:]]
    assert stale[0] == 0 < max(stale)
    # A pass for the old log-probs is made where, and only where, tokens are stale.
    assert [row["log_probs/sequences"] > 0 for row in rows[1:]] == [share > 0 for share in stale]
    assert all(row["partial/taken_groups"] == IN_FLIGHT - GROUPS for row in rows[2:])
    assert "loss/stale_masked" not in rows[-1]
    assert run.folder.joinpath("exported").is_dir()


@pytest.mark.slow
def test_a_checkpoint_keeps_what_is_half_made(pbsd):
    """A run that goes on from it trains on these groups, as they were."""
    options = (*CARRY, *INLINE, "--steps", "4", "--algorithm.name", "grpo")
    run = pbsd("half", *options)
    check_rows(run, 4)
    half, _ = carried(run, 2)
    assert any(member.generated for group in half for member in group.unfinished)
    again = pbsd("half", *options, "--resume", "step_2", "--rollout.stale_tokens", "mask")
    rows = check_rows(again, 4)
    made = trained(again, (3,))[3]
    known = {t.trajectory_id: t for t in made}
    for group in half:
        if group.oldest is None:
            continue
        for member in group.members:
            begun = getattr(member, "trajectory", member)
            now = known[member.trajectory_id]
            assert [turn.tokens for turn in now.turns[: len(begun.turns)]] == [turn.tokens for turn in begun.turns]
            tokens = getattr(member, "tokens", ())
            assert not tokens or now.turns[len(begun.turns)].tokens[: len(tokens)] == tokens
    tokens = [span.end - span.start for t in made for turn in t.turns for span in turn.versions if span.version < 2]
    assert tokens and rows[3]["loss/stale_masked"] == pytest.approx(sum(tokens) / sum(t.generated for t in made))


def check_rows(run, steps):
    rows = run.succeed()
    check(run, rows, steps)
    return rows


@pytest.mark.slow
def test_unfinished_groups_are_dropped_where_nothing_may_be_stale(pbsd):
    """With engines in processes of their own, which are interrupted."""
    run = pbsd("drop", *SMALL, "--rollout.over_sampling", "1.5", "--steps", "3", "--evaluation.every", "0")
    rows = run.succeed()
    made = trained(run, (1, 2, 3))
    assert all(len(members) == GROUPS * SIZE for members in made.values())
    for row in rows[1:]:
        assert (row["staleness/max"], row["partial/dropped_groups"], row["partial/taken_groups"]) == (0, 2, 0)
        assert row["partial/asked_groups"] == IN_FLIGHT and row["length_bias/trained_mean"] > 0
    assert sum(row["partial/wasted_tokens"] for row in rows[1:]) > 0
    position = read_manifest(run.folder / "checkpoints" / "step_3").contents.position
    assert position["prompts"] == 3 * IN_FLIGHT


@pytest.mark.slow
def test_carrying_over_ray(pbsd):
    run = pbsd("carry-ray", *CARRY, "--steps", "4")
    check(run, run.succeed(), 4)

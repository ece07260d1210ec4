"""`rollout.policy` and what belongs to it."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from megatron_pbsd.config import RolloutConfig, RunConfig
from megatron_pbsd.rollout.length_history import LengthHistory
from megatron_pbsd.rollout.policies.configured import configured_policy
from megatron_pbsd.rollout.policies.context_aware import ContextAware
from megatron_pbsd.rollout.policies.divided import Divided
from megatron_pbsd.rollout.policies.group_pinned import GroupPinned
from megatron_pbsd.rollout.policies.least_loaded import LeastLoaded
from megatron_pbsd.rollout.policies.longest_remaining import LongestRemaining

MINIMAL = {"name": "n", "steps": 1, "model": {"path": "m"}}


@pytest.mark.parametrize(("section", "message"), [
    ({"chunk_tokens": 8}, r"rollout.chunk_tokens = 8 has no effect with rollout.policy = 'least_loaded', which does"),
    ({"policy": "divided", "chunk_tokens": 33}, "the nearest valid value is 32")])
def test_chunks_are_of_policies_that_divide(section, message):
    with pytest.raises(ValidationError, match=message):
        RunConfig.model_validate({**MINIMAL, "rollout": section})


def test_longest_chunk():
    def chunk(**section):
        rollout = RunConfig.model_validate({**MINIMAL, "rollout": section}).rollout
        assert RolloutConfig(**rollout.model_dump()) == rollout
        return rollout.longest_chunk

    assert chunk() is chunk(policy="group_pinned") is None
    assert chunk(policy="divided") == 16 and chunk(policy="divided", max_turn_tokens=2048) == 256
    assert chunk(policy="longest_remaining", chunk_tokens=5) == 5


@pytest.mark.parametrize(("name", "kind"), [
    ("group_pinned", GroupPinned), ("least_loaded", LeastLoaded), ("divided", Divided), ("context_aware", ContextAware),
    ("longest_remaining", LongestRemaining)])
def test_the_policy_is_the_one_that_is_named(name, kind):
    config = RolloutConfig(policy=name, max_turns=3, max_turn_tokens=200, max_context=500)
    policy = configured_policy(config, {}, LengthHistory())
    assert type(policy) is kind and policy.chunk_tokens == (25 if config.divides else None)


def test_what_is_known_of_prompts_is_the_prior_of_their_groups():
    """The longest answer for the policy whose estimates are the longest, the geometric mean for the other."""
    history, config = LengthHistory(), RolloutConfig(policy="context_aware", max_turns=10, max_turn_tokens=100)
    history.asked("seen", [9, 9])
    history.asked("seen", [10, 40])
    assert (history.longest("seen"), history.typical("seen")) == (40, 20)
    assert history.longest("new") is history.typical("new") is None
    lengths = configured_policy(config, {"g0": "new", "g1": "seen"}, history).lengths
    assert (lengths.estimate("g0"), lengths.estimate("g1")) == (512, 40)
    assert (lengths.known("g0"), lengths.known("g1")) == (False, True)
    longest_remaining = config.model_copy(update={"policy": "longest_remaining"})
    lengths = configured_policy(longest_remaining, {"g0": "new", "g1": "seen"}, history).lengths
    assert lengths.known("g1") and lengths.remaining("g1", 0) < lengths.remaining("g0", 0) == 512

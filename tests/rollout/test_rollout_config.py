"""`rollout.policy` and what belongs to it."""

from __future__ import annotations

import re

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
    ({"policy": "divided", "chunk_tokens": 33}, "the nearest valid value is 32"),
    ({"speculation": {"paths": 4}}, r"paths = 4 has no effect with rollout.speculation.enabled = false: set enabled"),
    ({"speculation": {"enabled": True, "paths": 9}}, "less than or equal to 8")])
def test_what_has_no_effect_or_no_meaning_is_refused(section, message):
    with pytest.raises(ValidationError, match=message):
        RunConfig.model_validate({**MINIMAL, "rollout": section})


@pytest.mark.parametrize(("given", "message"), [
    ({"rollout": {"transport": {"bucket_mb": 64}}},
     "rollout.transport.bucket_mb has no effect with rollout.transport.kind = 'segment': leave it out"),
    ({"rollout": {"transport": {"kind": "buckets", "deltas": 2}}},
     "rollout.transport.deltas has no effect with rollout.transport.kind = 'buckets': leave it out"),
    ({"rollout": {"transport": {"kind": "collective"}}, "runtime": "inline",
      "learner": {"parallel": {"world_size": 1, "tp": 1}}},
     "'collective' is between processes, and runtime = 'inline' has one: set the kind to one of segment, buckets"),
    ({"rollout": {"transport": {"kind": "buckets"}}, "learner": {"release_memory": True}},
     "'buckets' keeps no copy of the weights: with learner.release_memory = true none of the rollout.engine_restarts "
     "= 2 engines could be given any"),
    ({"rollout": {"transport": {"kind": "collective"}, "engine": "sglang",
                  "sglang": {"python": "python", "args": {"pp_size": 2}}}}, "ranks of one stage alone can join")])
def test_what_a_transport_cannot_do_is_told_before_anything_starts(given, message):
    with pytest.raises(ValidationError, match=re.escape(message)):
        RunConfig.model_validate({**MINIMAL, **given})


OVER = {"over_sampling": 1.5}
STALE = {**OVER, "max_staleness": 1}


@pytest.mark.parametrize(("rollout", "algorithm", "messages"), [
    ({"max_staleness": 2}, {}, ["max_staleness = 2 has no effect with rollout.over_sampling = 1.*such as 1.5"]),
    ({"over_sampling": 0.5}, {}, ["greater than or equal to 1"]),
    ({**OVER, "stale_tokens": "mask"}, {}, ["stale_tokens = 'mask' has no effect with rollout.max_staleness = 0"]),
    (OVER, {"name": "sft"}, ["over_sampling = 1.5 has no effect with algorithm.name = 'sft'"]),
    (OVER, {"name": "dapo"}, ["over_sampling = 1.5 and algorithm.sampling_attempts = 4 both ask for more prompts"]),
    (STALE, {"name": "grpo", "loss": {"mismatch": {"name": "none"}}},
     ["stale_tokens = 'correct' corrects nothing with algorithm.loss.mismatch.name = 'none': .*'mask'.*'token_tis'"]),
    (STALE, {"name": "distill", "loss": {"name": "reverse_kl"}},
     ["corrects nothing with algorithm.loss.name = 'reverse_kl': set stale_tokens to 'mask'"]),
    ({**OVER, "max_staleness": 0, "stale_tokens": "mask", "chunk_tokens": 4}, {"name": "dapo"},
     ["rollout.chunk_tokens = 4", "stale_tokens = 'mask'", "sampling_attempts = 4"]),
])
def test_what_over_sampling_cannot_be_combined_with_is_told_at_once(rollout, algorithm, messages):
    with pytest.raises(ValidationError) as refused:
        RunConfig.model_validate({**MINIMAL, "rollout": rollout, "algorithm": algorithm or {"name": "grpo"}})
    for message in messages:
        assert re.search(message, str(refused.value)), message


@pytest.mark.parametrize("algorithm", [
    {"name": "pbsd"}, {"name": "gspo"}, {"name": "dapo", "sampling_attempts": 1},
    {"name": "distill", "loss": {"name": "jsd"}}])
def test_what_over_sampling_can_be_combined_with(algorithm):
    uncorrected = {"name": "grpo", "loss": {"mismatch": {"name": "none"}}}
    for rollout, beside in ((STALE, algorithm), ({**STALE, "stale_tokens": "mask"}, uncorrected), (OVER, uncorrected)):
        config = RunConfig.model_validate({**MINIMAL, "rollout": rollout, "algorithm": beside})
        assert rollout.items() <= config.rollout.model_dump().items() and config.algorithm.name == beside["name"]


@pytest.mark.parametrize(("over", "prompts", "in_flight"), [(1.0, 16, 16), (1.5, 3, 5), (1.01, 4, 5), (2.0, 7, 14)])
def test_prompts_in_flight(over, prompts, in_flight):
    assert RolloutConfig(over_sampling=over, prompts_per_step=prompts).prompts_in_flight == in_flight


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

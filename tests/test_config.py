"""Sections that depend on each other."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from megatron_pbsd.algorithms import ALGORITHMS
from megatron_pbsd.config import DAPOConfig, LearnerConfig, ParallelConfig, PolicyLossConfig, PPOConfig, RunConfig

MINIMAL = {"name": "n", "steps": 1, "model": {"path": "m"}}


def algorithm(**section):
    return RunConfig.model_validate({**MINIMAL, "algorithm": section}).algorithm


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_can_be_asked_for_and_written_down(name):
    config = algorithm(name=name)
    assert config.name == name
    assert algorithm(**config.model_dump(mode="json")) == config


def test_a_loss_given_in_part_keeps_the_algorithms_own_defaults():
    """`--algorithm.name gspo --algorithm.loss.entropy_coefficient 0.1` is still GSPO."""
    plain, given = algorithm(name="gspo").loss, algorithm(name="gspo", loss={"entropy_coefficient": 0.1}).loss
    assert given == plain.model_copy(update={"entropy_coefficient": 0.1})
    assert (given.ratio, given.clip_low, given.reduction) == ("sequence", 3e-4, "trajectory")
    assert algorithm(name="gspo", loss={"clip_low": 0.1}).loss.clip_high == 4e-4
    assert algorithm(name="ppo", loss={"clip_low": 0.1}).loss.value is not None
    # Neither another algorithm's nor a caller's own loss is touched.
    assert algorithm(name="grpo", loss={"entropy_coefficient": 0.1}).loss == PolicyLossConfig(entropy_coefficient=0.1)
    assert algorithm(name="gspo", loss=PolicyLossConfig(clip_low=0.3)).loss == PolicyLossConfig(clip_low=0.3)


def test_ppo_needs_a_value_head():
    with pytest.raises(ValidationError, match="ppo needs a value head"):
        PPOConfig(loss=PolicyLossConfig())


def test_the_cache_of_the_length_punishment_fits():
    with pytest.raises(ValidationError, match="at most 16"):
        DAPOConfig(overlong_tokens=16, overlong_cache=17)


def test_a_reference_needs_weights_to_load():
    model = {"path": "m", "initial_weights": "random"}
    with pytest.raises(ValidationError, match=r"algorithm.kl_penalty = 0.1 compares the policy"):
        RunConfig.model_validate({**MINIMAL, "model": model, "algorithm": {"name": "reinforce_pp", "kl_penalty": 0.1}})
    with pytest.raises(ValidationError, match=r"algorithm.loss.kl_reference = 'reference' compares the policy"):
        RunConfig.model_validate({**MINIMAL, "model": model, "algorithm": {"loss": {"kl_reference": "reference"}}})
    RunConfig.model_validate({**MINIMAL, "model": model, "algorithm": {"name": "reinforce_pp"}})


def test_distillation_has_losses_of_its_own():
    assert algorithm(name="distill", loss={"name": "jsd", "beta": 0.1}).loss.beta == 0.1
    with pytest.raises(ValidationError, match="outcome_weight = 0.5 has no effect with loss.name = 'jsd'"):
        algorithm(name="distill", outcome_weight=0.5, loss={"name": "jsd"})
    with pytest.raises(ValidationError, match="'policy', 'custom'"):
        algorithm(name="grpo", loss={"name": "jsd"})


@pytest.mark.parametrize(("changes", "words"), [
    ({"world_size": 3, "tp": 2}, "world_size = 3 is not a multiple of tp \\* pp \\* cp = 2 \\* 1 \\* 1 = 2"),
    ({"world_size": 4, "tp": 2, "cp": 4}, "tp \\* pp \\* cp = 2 \\* 1 \\* 4 = 8; with 4 ranks .* one of \\[1, 2, 4\\]"),
    ({"world_size": 4, "tp": 1, "ep": 3}, "ep \\* etp = 3 \\* 1 = 3 does not divide the 4 ranks .* \\[1, 2, 4\\]"),
    ({"world_size": 4, "tp": 1, "pp": 2, "ep": 4}, "does not divide the 2 ranks of a pipeline stage"),
    ({"world_size": 2, "tp": 2, "vpp": 2}, "vpp = 2 needs a pipeline"),
    ({"world_size": 2, "tp": 1, "sequence_parallel": True}, "sequence_parallel = True needs tp of 2 or more"),
])
def test_layouts_that_cannot_be(changes, words):
    with pytest.raises(ValueError, match=words):
        ParallelConfig(**changes)


def test_a_context_that_no_micro_batch_holds_is_named():
    run = {"name": "x", "steps": 1, "model": {"path": "x"}, "rollout": {"max_context": 400}}
    with pytest.raises(ValueError, match="rollout.max_context = 400 .* lower max_context to at most 101"):
        RunConfig.model_validate({**run, "learner": {"micro_batch_tokens": 100}})
    RunConfig.model_validate({**run, "learner": {"micro_batch_tokens": 100, "parallel": {
        "world_size": 4, "tp": 1, "cp": 4}}})


@pytest.mark.parametrize(("sizes", "message"), [
    ({"cp": 2}, "needs cp = 1, but it is 2"), ({"pp": 2}, "needs pp = 1, but it is 2"),
    ({"ep": 2}, "needs ep = 1, but it is 2"),
    ({"tp": 4}, r"world_size / tp = 4 / 4 is 1; the nearest valid world_size is 8"),
    ({"world_size": 6, "tp": 2}, r"world_size / tp = 6 / 2 is 3; the nearest valid world_size is 4"),
], ids=str)
def test_dynamic_context_parallelism_needs_blocks_of_data_parallel_ranks(sizes, message):
    with pytest.raises(ValidationError, match=message):
        ParallelConfig(**{"world_size": 4, "tp": 1, **sizes}, dynamic_cp=True)


def test_dynamic_context_parallelism_needs_packing_and_no_balancing_loss():
    parallel = ParallelConfig(world_size=4, tp=2, dynamic_cp=True)
    with pytest.raises(ValidationError, match="needs batching = 'packed', which is 'padded'"):
        LearnerConfig(parallel=parallel, batching="padded")
    with pytest.raises(ValidationError, match="moe.aux_loss_coefficient = 0.1 needs parallel.dynamic_cp = False"):
        LearnerConfig(parallel=parallel, moe={"aux_loss_coefficient": 0.1})
    LearnerConfig(parallel=parallel)


@pytest.mark.parametrize(("checkpoint", "evaluation", "words"), [
    ({"every": 20, "keep_every": 50}, {}, r"keep_every = 50 names steps .* checkpoint.every = 20 .* multiple is 40"),
    ({"every": 20, "keep_every": 5}, {}, "the nearest multiple is 20"),
    ({"every": 0, "keep_every": 5}, {}, "set checkpoint.every to it"),
    ({"every": 20, "best": {"metric": "eval/f1"}}, {"every": 15},
     r"'eval/f1' is not known of every checkpoint: checkpoint.every = 20, evaluation.every = 15; the nearest .* is 15"),
    ({"every": 20, "best": {"metric": "eval/f1"}}, {"every": 0}, "set evaluation.every to 20"),
    ({"best": {"metric": "eval/f1", "direction": "most"}}, {}, "'max' or 'min'"),
    ({"export_hf": "always"}, {}, "'final', 'every' or 'never'"),
])
def test_checkpoints_that_cannot_be_kept_as_asked(checkpoint, evaluation, words):
    with pytest.raises(ValidationError, match=words):
        RunConfig.model_validate({**MINIMAL, "checkpoint": checkpoint, "evaluation": evaluation})


def test_checkpoints_as_they_may_be_kept():
    for checkpoint in ({"every": 20, "keep_every": 40}, {"every": 20, "best": {"metric": "eval/f1"}},
                       {"every": 7, "best": {"metric": "loss/total", "direction": "min"}}, {"every": 0, "keep": 1}):
        RunConfig.model_validate({**MINIMAL, "checkpoint": checkpoint, "evaluation": {"every": 10}})

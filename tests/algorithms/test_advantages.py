"""Every algorithm against its formula written out with plain loops, and what must hold whatever the batch."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from megatron_pbsd.algorithms import Outcome, build_algorithm
from megatron_pbsd.algorithms.ppo import generalised_advantages
from megatron_pbsd.algorithms.rewards import overlong_penalty
from megatron_pbsd.config import (
    CISPOConfig,
    DAPOConfig,
    DistillConfig,
    DrGRPOConfig,
    GRPOConfig,
    GSPOConfig,
    PBSDConfig,
    PPOConfig,
    ReinforcePPConfig,
    RLOOConfig,
)

GROUP_RELATIVE = [GRPOConfig(), DrGRPOConfig(), DAPOConfig(), GSPOConfig(), CISPOConfig(), RLOOConfig()]
BATCH_NORMALISED = [ReinforcePPConfig(), ReinforcePPConfig(group_baseline=True), ReinforcePPConfig(kl_penalty=0.1),
                    PPOConfig(), PPOConfig(gamma=0.9, gae_lambda=0.5, kl_penalty=0.2)]
OTHERS = [DistillConfig(outcome_weight=0.5, coefficient=2.0), DistillConfig(exclude_answer_span=False), PBSDConfig(),
          PPOConfig(whiten=False), DAPOConfig(overlong_tokens=12, overlong_cache=6)]
EVERY = [pytest.param(config, id=f"{config.name}-{i}") for i, config in
         enumerate([*GROUP_RELATIVE, *BATCH_NORMALISED, *OTHERS])]


def outcome(group, reward, turns, seed):
    """Turns of the given lengths; the last one is the answer, all but its last token inside the answer's span."""
    rng, n = np.random.default_rng(seed), sum(turns)
    answer = np.zeros(n, bool)
    answer[n - turns[-1] : n - 1] = True
    columns = [-rng.exponential(1, n).astype(np.float32) for _ in range(3)]
    values = rng.normal(0, 1, n).astype(np.float32)
    return Outcome(group, reward, np.repeat(np.arange(len(turns)), turns), answer, *columns, values)


batches = st.lists(
    st.builds(outcome, st.sampled_from("abc"), st.sampled_from([0.0, 0.25, 1.0, -2.0]),
              st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(0, 2**31)), min_size=1, max_size=9)


def reference(config, batch):
    """The advantage of every token, one trajectory and token at a time."""
    result = []
    for own in batch:
        group = [o for o in batch if o.group_id == own.group_id]
        others = [o.reward for o in group if o is not own]
        mean = sum(o.reward for o in group) / len(group)
        std = math.sqrt(sum((o.reward - mean) ** 2 for o in group) / len(group))
        tokens = range(own.tokens)
        match config:
            case DAPOConfig(overlong_tokens=12):
                shaped = {id(o): o.reward + min(0, max(-1, (6 - o.tokens) / 6)) for o in group}
                mean = sum(shaped.values()) / len(group)
                std = math.sqrt(sum((r - mean) ** 2 for r in shaped.values()) / len(group))
                row = [(shaped[id(own)] - mean) / std if std > 1e-6 else 0.0 for _ in tokens]
            case GRPOConfig():
                row = [(own.reward - mean) / std if std > 0 else 0.0 for _ in tokens]
            case DrGRPOConfig():
                row = [own.reward - mean for _ in tokens]
            case RLOOConfig():
                row = [own.reward - sum(others) / len(others) if others else 0.0 for _ in tokens]
            case ReinforcePPConfig():
                reward = own.reward - mean if config.group_baseline else own.reward
                kl = [float(s) - float(r) for s, r in zip(own.student, own.reference, strict=True)]
                row = [reward - config.kl_penalty * sum(kl[t:]) for t in tokens]
            case PPOConfig():
                kl = [float(s) - float(r) for s, r in zip(own.student, own.reference, strict=True)]
                rewards = [-config.kl_penalty * k for k in kl]
                rewards[-1] += own.reward
                row = gae(rewards, own.values.tolist(), config.gamma, config.gae_lambda)
            case DistillConfig():
                relative = (own.reward - mean) / std if std > 0 else 0.0
                row = [config.outcome_weight * relative - config.coefficient * (float(s) - float(p))
                       * (not (config.exclude_answer_span and a))
                       for s, p, a in zip(own.student, own.teacher, own.answer_mask, strict=True)]
        result.append(row)
    if isinstance(config, ReinforcePPConfig) or (isinstance(config, PPOConfig) and config.whiten):
        flat = [a for row in result for a in row]
        mean = sum(flat) / len(flat)
        std = math.sqrt(sum((a - mean) ** 2 for a in flat) / len(flat))
        result = [[(a - mean) / std if std > 1e-6 else 0.0 for a in row] for row in result]
    return result


def gae(rewards, values, gamma, lam):
    """GAE as the sum over all later one-step errors (arXiv 1506.02438, eq. 16)."""
    n = len(rewards)
    at = [*values, 0.0]
    deltas = [rewards[t] + gamma * at[t + 1] - at[t] for t in range(n)]
    return [sum((gamma * lam) ** (u - t) * deltas[u] for u in range(t, n)) for t in range(n)]


@pytest.mark.parametrize("config", [p for p in EVERY if not isinstance(p.values[0], PBSDConfig)])
@settings(deadline=None, max_examples=40)
@given(batch=batches)
def test_advantages_are_the_formula(config, batch):
    got = build_algorithm(config).assign(batch).advantages
    for row, expected, o in zip(got, reference(config, batch), batch, strict=True):
        assert row.dtype == np.float32 and row.shape == (o.tokens,)
        np.testing.assert_allclose(row, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", EVERY)
@settings(deadline=None, max_examples=40)
@given(batch=batches, random=st.randoms(use_true_random=False))
def test_the_order_of_the_batch_does_not_matter(config, batch, random):
    order = random.sample(range(len(batch)), len(batch))
    algorithm = build_algorithm(config)
    plain, shuffled = algorithm.assign(batch), algorithm.assign([batch[i] for i in order])
    for place, i in enumerate(order):
        np.testing.assert_allclose(shuffled.advantages[place], plain.advantages[i], rtol=1e-5, atol=1e-5)
    assert shuffled.metrics.keys() == plain.metrics.keys()
    assert list(shuffled.metrics.values()) == pytest.approx(list(plain.metrics.values()), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("config", [pytest.param(c, id=c.name) for c in [*GROUP_RELATIVE, PBSDConfig()]])
@settings(deadline=None, max_examples=40)
@given(batch=batches)
def test_advantages_of_each_group_have_mean_zero_however_large_it_is(config, batch):
    credit = build_algorithm(config).assign(batch)
    by_group = {}
    for o, row in zip(batch, credit.advantages, strict=True):
        by_group.setdefault(o.group_id, []).append(float(row.mean()))
    for means in by_group.values():
        assert sum(means) == pytest.approx(0, abs=1e-5)
        if len(means) == 1:
            assert means == [0.0]


@pytest.mark.parametrize("config", BATCH_NORMALISED)
@settings(deadline=None, max_examples=40)
@given(batch=batches)
def test_normalised_advantages_have_mean_zero_and_deviation_one_over_tokens(config, batch):
    tokens = np.concatenate(build_algorithm(config).assign(batch).advantages).astype(np.float64)
    assert tokens.mean() == pytest.approx(0, abs=1e-4)
    assert tokens.std() == pytest.approx(1, abs=1e-3) or not tokens.any()


@settings(deadline=None, max_examples=60)
@given(batch=batches, extra=st.integers(1, 4))
def test_other_groups_do_not_touch_a_groups_advantages(batch, extra):
    """A larger, differently rewarded group beside it; the same for every baseline that is the group's own."""
    others = [outcome("z", float(i), [2], i) for i in range(extra)]
    for config in GROUP_RELATIVE:
        algorithm = build_algorithm(config)
        beside = algorithm.assign([*others, *batch]).advantages[extra:]
        for row, expected in zip(beside, algorithm.assign(batch).advantages, strict=True):
            np.testing.assert_array_equal(row, expected)


def test_time_runs_over_generated_tokens_and_not_over_turns():
    """PPO: where the turns end is nothing to the estimator; the value before an observation counts for after it too."""
    one, several = outcome("a", 1.0, [6], 3), outcome("a", 1.0, [1, 2, 3], 3)
    algorithm = build_algorithm(PPOConfig(whiten=False))
    np.testing.assert_array_equal(algorithm.assign([one]).advantages[0], algorithm.assign([several]).advantages[0])


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(-3, 3), st.floats(-3, 3)), min_size=1, max_size=12))
def test_the_limits_of_generalised_advantages(pairs):
    """lambda = 1 is return minus value, lambda = 0 the one-step error."""
    rewards, values = (np.array(column) for column in zip(*pairs, strict=True))
    to_go = np.array([rewards[t:].sum() for t in range(len(rewards))])
    np.testing.assert_allclose(generalised_advantages(rewards, values, 1.0, 1.0), to_go - values, atol=1e-9)
    np.testing.assert_allclose(
        generalised_advantages(rewards, values, 0.9, 0.0), rewards + 0.9 * np.append(values[1:], 0) - values, atol=1e-9)


def test_returns_are_what_the_value_head_should_have_said():
    """With lambda = 1 they are the rewards to go, whatever it did say, and whitening does not touch them."""
    batch = [outcome("a", 1.0, [2, 3], 5), outcome("a", -2.0, [4], 6)]
    for whiten in (True, False):
        returns = build_algorithm(PPOConfig(gae_lambda=1.0, whiten=whiten)).assign(batch).returns
        np.testing.assert_allclose(returns[0], np.full(5, 1.0), atol=1e-6)
        np.testing.assert_allclose(returns[1], np.full(4, -2.0), atol=1e-6)


def test_length_is_punished_softly():
    punished = [overlong_penalty(n, longest=10, cache=4) for n in (0, 6, 7, 9, 10, 11)]
    assert punished == [0.0, 0.0, -0.25, -0.75, -1.0, -1.0]


def test_distilling_follows_the_gradient_of_the_reverse_kl():
    """On a vocabulary small enough to sum over: E_student[A grad log pi] = -c grad KL(student || teacher)."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, generator=generator, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(7, generator=generator, dtype=torch.float64).log_softmax(0)
    student = logits.log_softmax(0)
    (gradient,) = torch.autograd.grad((student.exp() * (student - teacher)).sum(), logits, retain_graph=True)

    tokens = [Outcome("g", 0.0, np.zeros(1, np.int64), np.zeros(1, bool), student[[y]].detach().numpy(),
                      teacher[[y]].numpy()) for y in range(7)]
    credited = build_algorithm(DistillConfig(coefficient=3.0)).assign(tokens).advantages
    advantages = torch.tensor(np.concatenate(credited))
    (policy_gradient,) = torch.autograd.grad((student.exp().detach() * advantages * student).sum(), logits)
    torch.testing.assert_close(policy_gradient, -3.0 * gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("config", EVERY)
def test_what_an_algorithm_needs_is_what_it_reads(config):
    """With nothing else it works; without any one of its needs it says which."""
    algorithm, whole = build_algorithm(config), outcome("a", 1.0, [2, 3], 0)
    every = ("student", "teacher", "reference", "values")
    bare = replace(whole, **{name: None for name in every if name not in algorithm.needs})
    np.testing.assert_array_equal(algorithm.assign([bare]).advantages, algorithm.assign([whole]).advantages)
    for need in algorithm.needs:
        with pytest.raises(ValueError, match=f"the outcome has no '{need}'"):
            algorithm.assign([replace(whole, **{need: None})])

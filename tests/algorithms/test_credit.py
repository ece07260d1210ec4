"""Credit assignment against enumeration and brute force."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from megatron_pbsd.algorithms import Outcome, build_algorithm
from megatron_pbsd.algorithms.advantages import group_relative
from megatron_pbsd.algorithms.evidence import turn_evidence
from megatron_pbsd.config import GRPOConfig, PBSDConfig


def outcome(turns, student, teacher, reward=1.0, group="g", answer=None):
    turn_index = np.repeat(np.arange(len(turns)), turns)
    mask = np.zeros(len(turn_index), bool)
    if answer:
        mask[slice(*answer)] = True
    return Outcome(group, reward, turn_index, mask, np.asarray(student, np.float32), np.asarray(teacher, np.float32))


def test_evidence_is_the_log_posterior_to_prior_ratio():
    """On an enumerable world (3 turns of 2 tokens, answers and observations with a random joint) the turn evidences
    sum to log p(a|tau) - log p(a), and partial sums give the ratio for every prefix of turns."""
    rng = np.random.default_rng(0)
    vocabulary, tokens, answers = 3, 6, 4
    joint = rng.dirichlet(np.ones(answers * vocabulary**tokens)).reshape(answers, *[vocabulary] * tokens)
    student = joint.sum(0)
    prior = joint.reshape(answers, -1).sum(1)

    def log_prob(world, path, t):
        """log p(path[t] | path[:t]) under an unnormalised table over paths."""
        return np.log(world[path[: t + 1]].sum() / world[path[:t]].sum())

    for path in itertools.islice(itertools.product(range(vocabulary), repeat=tokens), 0, None, 37):
        for a in range(answers):
            o = Outcome("g", 1.0, np.repeat([0, 1, 2], 2), np.zeros(6, bool),
                        np.array([log_prob(student, path, t) for t in range(tokens)]),
                        np.array([log_prob(joint[a], path, t) for t in range(tokens)]))
            partial = np.cumsum(turn_evidence(o, exclude_answer_span=True).turns)
            for k in range(3):
                prefix = path[: 2 * (k + 1)]
                posterior = joint[a][prefix].sum() / student[prefix].sum()
                assert partial[k] == pytest.approx(np.log(posterior / prior[a]), abs=1e-6)


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(-5, 5)), min_size=1, max_size=20), st.randoms())
def test_group_baseline_is_keyed_by_group_not_by_position(pairs, random):
    """Uneven groups in any order: the same as looking at each group alone."""
    ids, rewards = [p[0] for p in pairs], [p[1] for p in pairs]
    got = group_relative(rewards, ids, normalise_std=False)
    for i, (group, reward) in enumerate(pairs):
        own = [r for g, r in pairs if g == group]
        assert got[i] == pytest.approx(reward - sum(own) / len(own), abs=1e-8)
    order = list(range(len(pairs)))
    random.shuffle(order)
    shuffled = group_relative([rewards[i] for i in order], [ids[i] for i in order], normalise_std=False)
    np.testing.assert_allclose(shuffled, got[order], atol=1e-8)


def test_grpo_gives_each_token_the_outcome_advantage():
    batch = [outcome([2, 3], [0] * 5, [0] * 5, r, g) for r, g in [(1, "a"), (0, "a"), (1, "b"), (1, "b"), (0, "a")]]
    credit = build_algorithm(GRPOConfig(normalise_std=False)).assign(batch)
    expected = [2 / 3, -1 / 3, 0, 0, -1 / 3]
    for advantage, value in zip(credit.advantages, expected, strict=True):
        np.testing.assert_allclose(advantage, np.full(5, value), rtol=1e-6)


outcomes_strategy = st.lists(
    st.tuples(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.floats(0, 1), st.sampled_from("ab"),
              st.integers(0, 2**31)), min_size=2, max_size=8)


def random_outcomes(spec):
    batch = []
    for turns, reward, group, seed in spec:
        rng = np.random.default_rng(seed)
        n = sum(turns)
        batch.append(outcome(turns, -rng.exponential(1, n), -rng.exponential(1, n), reward, group))
    return batch


@settings(deadline=None, max_examples=60)
@given(outcomes_strategy, st.floats(0, 2), st.booleans())
def test_pbsd_redistributes_and_never_inflates(spec, gate, normalise):
    """The token mean of the advantage stays the outcome advantage, its sign is kept, and multipliers are bounded."""
    batch = random_outcomes(spec)
    config = PBSDConfig(snr_gate=gate, normalise_length=normalise, epsilon=0.5)
    credit = build_algorithm(config).assign(batch)
    plain = group_relative([o.reward for o in batch], [o.group_id for o in batch], True)
    for advantage, value in zip(credit.advantages, plain, strict=True):
        assert advantage.mean() == pytest.approx(value, abs=1e-5)
        assert np.all(np.sign(advantage) == np.sign(np.float32(value)))
        assert np.all(abs(advantage) <= abs(value) * 3 + 1e-6)


def test_pbsd_prefers_turns_with_evidence_in_success_and_blames_turns_against_it_in_failure():
    teacher, student = [-1, -1, -3, -3, -1, -1], [-2, -2, -1, -1, -1, -1]     # turn 0 for, turn 1 against, 2 neutral
    batch = [outcome([2, 2, 2], student, teacher, reward, "g") for reward in (1.0, 0.0)]
    won, lost = build_algorithm(PBSDConfig(snr_gate=0.1)).assign(batch).advantages
    assert won[0] > won[4] > won[2] > 0
    assert lost[2] < lost[4] < lost[0] < 0


def test_snr_gate_leaves_noise_alone():
    rng = np.random.default_rng(1)
    student = -np.ones(60)
    teacher = student + rng.normal(0, 1, 60)
    noisy = [outcome([20, 20, 20], student, teacher, r, "g") for r in (1.0, 0.0)]
    for advantage in build_algorithm(PBSDConfig(snr_gate=5.0)).assign(noisy).advantages:
        assert np.ptp(advantage) == 0
    assert np.ptp(build_algorithm(PBSDConfig(snr_gate=0.0)).assign(noisy).advantages[0]) > 0


def test_a_longer_turn_with_the_same_drift_is_not_punished():
    """E_student[delta] = -KL <= 0: equal drift per token must not make the long turn look worse."""
    n = [2, 30]
    for normalise in (True, False):
        credit = build_algorithm(PBSDConfig(snr_gate=0, normalise_length=normalise)).assign(
            [outcome(n, np.zeros(32), np.full(32, -0.3), r, "g") for r in (1.0, 0.0)])
        assert np.ptp(credit.advantages[0]) < 1e-6


def test_the_answer_span_is_left_out_of_the_evidence():
    o = outcome([2, 4], np.zeros(6), [0, 0, 0, 9, 9, 0], answer=(3, 5))
    assert turn_evidence(o, exclude_answer_span=True).turns.tolist() == [0, 0]
    assert turn_evidence(o, exclude_answer_span=False).turns.tolist() == [0, 18]


def test_missing_teacher_is_an_error():
    o = outcome([2], [0, 0], [0, 0])
    with pytest.raises(ValueError, match="no 'teacher'"):
        turn_evidence(Outcome(o.group_id, 1.0, o.turn_index, o.answer_mask, o.student, None), True)

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import example, given, settings, strategies as st

from megatron_pbsd.rollout.drafting.draft_lengths import LINES, TREES, DraftLengths
from megatron_pbsd.rollout.drafting.draft_tree import NO_DRAFT, DraftTree
from megatron_pbsd.rollout.drafting.step_cost import DecayedLeastSquares, StepCost


@dataclass
class Engine:
    """An engine that costs and accepts what it is told to, and how much a rule makes of it.

    acceptance: chance of a token that follows an accepted one, or begins the first path. others: chance that one of the
    other paths begins as it should where the first does not.
    """

    step: float
    per_sequence: float
    per_draft: float
    per_token: float
    acceptance: float
    noise: float = 0.0
    seed: int = 0
    paths: int = 1
    others: float = 0.0

    def __post_init__(self) -> None:
        self.draft = DraftTree.of([[path] * 8 for path in range(self.paths)])
        self.random = random.Random(self.seed)
        self.seconds = self.plain_seconds = 0.0
        self.tokens = self.drafted_steps = self.tree_steps = 0

    def plain(self, sequences: int) -> float:
        return self.step + self.per_sequence * sequences

    def run(self, rule: DraftLengths, sequences: int) -> None:
        drafts, rests = [NO_DRAFT] * sequences, rule.rests(sequences)
        if not rests and rule.worthwhile(sequences, ()):
            available = [self.draft] * sequences
            rule.available(sequences, available)
            drafts = rule.choose(available, sequences, ())
        kept = [self._kept(draft) for draft in drafts]
        drafted, accepted = sum(map(len, drafts)), sum(map(len, kept))
        made = self.plain(sequences) + self.per_draft * sum(map(bool, drafts)) + self.per_token * drafted
        luck = 1 + self.noise * self.random.uniform(-1, 1)
        made *= luck
        if rests:
            rule.rested(made)
        else:
            rule.observe(sequences, (), drafts, kept, made)
        self.seconds += made
        self.tokens += sequences + accepted
        self.plain_seconds += luck * self.plain(sequences) / sequences * (sequences + accepted)
        self.drafted_steps += drafted > 0
        self.tree_steps += any(draft.branches for draft in drafts)

    def _kept(self, draft: DraftTree) -> list[int]:
        """Paths have nothing in common, so that the nodes of each are numbered in a row."""
        if not draft:
            return []
        path, first = 0, self.random.random()
        if first >= self.acceptance:
            path = 1 if first < self.acceptance + (1 - self.acceptance) * self.others else self.paths
            if path * draft.depth >= len(draft):
                return []
        follow = next((i for i in range(1, draft.depth) if self.random.random() >= self.acceptance), draft.depth)
        return list(range(path * draft.depth, path * draft.depth + follow))

    def best_speed(self, sequences: int) -> float:
        """Of all shapes and lengths, over no drafts."""
        speeds = [1.0]
        for paths in {1, self.paths}:
            chance = self.acceptance + (1 - self.acceptance) * self.others * (paths > 1)
            for n in range(1, 9):
                yielded = 1 + chance * sum(self.acceptance ** i for i in range(n))
                extra = sequences * (self.per_draft + self.per_token * n * paths)
                speeds.append(yielded * self.plain(sequences) / (self.plain(sequences) + extra))
        return max(speeds)

    def worst_step(self, sequences: int) -> float:
        """Seconds of the longest that can be."""
        extra = sequences * (self.per_draft + len(self.draft) * self.per_token)
        return (1 + self.noise) * (self.plain(sequences) + extra)


costs = st.builds(
    Engine, step=st.floats(1e-4, 1.0), per_sequence=st.floats(1e-5, 0.1), per_draft=st.floats(0, 0.3),
    per_token=st.floats(0, 0.3), acceptance=st.floats(0, 1), noise=st.sampled_from([0.0, 0.1, 0.3]),
    seed=st.integers(0, 99), paths=st.sampled_from([1, 2, 4]), others=st.floats(0, 1))


@settings(max_examples=25)
@given(costs, st.integers(1, 40))
@example(Engine(1.0, 0.0625, 0.0, 0.09375, acceptance=1.0, noise=0.3), 38)
def test_never_slower_by_more_than_two_percent(engine, sequences):
    rule = DraftLengths(paths=engine.paths)
    for _ in range(800):
        engine.run(rule, sequences)
    # And the first step with drafts, which are long, and whose loss nobody could foresee.
    assert engine.seconds <= 1.02 * engine.plain_seconds + engine.worst_step(sequences)


@settings(max_examples=25)
@given(costs, st.integers(1, 40))
@example(Engine(1.0, 0.1, 0.226, 0.0, acceptance=0.75, noise=0.3, seed=4), 23)
@example(Engine(0.25, 0.03125, 0.25, 0.125, acceptance=0.9375), 1)
def test_most_of_what_can_be_won_is_won(engine, sequences):
    engine.noise, rule = min(engine.noise, 0.1), DraftLengths(paths=engine.paths)
    for _ in range(800):
        engine.run(rule, sequences)
    engine.seconds = engine.plain_seconds = 0.0
    for _ in range(200):
        engine.run(rule, sequences)
    won, best = engine.plain_seconds / engine.seconds, engine.best_speed(sequences)
    # What pays little does not count as paying: see WORTH.
    assert won >= 1 + 0.8 * (best - 1) - 0.2


def test_drafts_that_stop_paying_stop_and_begin_again():
    """What was accepted is rejected from some step on, as when a batch fills or the policy changes."""
    engine, rule = Engine(1.0, 0.001, 0.0, 0.01, acceptance=0.8), DraftLengths()
    drafted = []
    for acceptance in (0.8, 0.0, 0.8):
        engine.acceptance = acceptance
        for _ in range(800):
            engine.run(rule, 16)
        engine.drafted_steps = 0
        for _ in range(300):
            engine.run(rule, 16)
        drafted.append(engine.drafted_steps)
    assert drafted[0] > 270 and drafted[1] < 30 and drafted[2] > 270


def test_plain_steps_that_become_cheaper_are_noticed_while_drafts_are_made():
    """As when contexts are shorter: drafts won 0.7 of a step in 0.4 of one, and now it is 0.07 in 0.4."""
    engine, rule = Engine(1.0, 0.0, 0.0, 0.05, acceptance=0.8), DraftLengths()
    for _ in range(600):
        engine.run(rule, 8)
    assert engine.drafted_steps > 500
    engine.step = 0.1
    for _ in range(1500):
        engine.run(rule, 8)
    engine.drafted_steps = 0
    for _ in range(200):
        engine.run(rule, 8)
    assert engine.drafted_steps < 20


def test_what_few_sequences_win_is_not_spent_on_many():
    """Batches of 40, where a drafted token costs more than it brings, alternate with what is left of them."""
    engine, rule = Engine(1.0, 0.02, 0.0, 0.05, acceptance=0.7, noise=0.1), DraftLengths()
    drafted = {40: 0, 2: 0}
    for _ in range(20):
        for sequences in drafted:
            engine.drafted_steps = 0
            for _ in range(40):
                engine.run(rule, sequences)
            drafted[sequences] += engine.drafted_steps
    assert drafted[40] < 40 and drafted[2] > 500


@pytest.mark.parametrize(("per_token", "pays"), [(0.01, True), (0.1, False)])
def test_a_machine_that_others_slow_down_at_times_does_not_mislead(per_token, pays):
    """Plain steps and those with drafts take half as long again during every other thirty."""
    engine, rule = Engine(1.0, 0.02, 0.0, per_token, acceptance=0.6, noise=0.1), DraftLengths()
    for step in range(1500):
        slow = 1.5 if step // 30 % 2 else 1.0
        engine.step, engine.per_sequence, engine.per_token = slow, 0.02 * slow, per_token * slow
        engine.run(rule, 16)
    assert engine.drafted_steps > 1200 if pays else engine.drafted_steps < 60
    assert engine.seconds <= 1.02 * engine.plain_seconds


def test_a_pause_of_the_machine_does_not_end_drafts_that_pay():
    engine, rule = Engine(1.0, 0.001, 0.0, 0.01, acceptance=0.8), DraftLengths()
    for _ in range(600):
        engine.run(rule, 16)
    engine.step, engine.drafted_steps = 500.0, 0
    engine.run(rule, 16)
    engine.step = 1.0
    for _ in range(50):
        engine.run(rule, 16)
    assert engine.drafted_steps > 40


def chosen(rule, available):
    """Lengths of lines that are left of lines of these lengths."""
    drafts = rule.choose([DraftTree.line([0] * n) for n in available], 10, ())
    assert not any(draft.branches for draft in drafts)
    return [len(draft) for draft in drafts]


def known(chances, per_token, sequences=10, paths=1):
    """A rule that has learned these conditional chances and costs."""
    rule = DraftLengths(len(chances), paths)
    for _ in range(400):
        rule.cost.observe(sequences, (), 0, 0, 1.0)
    for n in (1, 2, 3, 4) * 20:
        rule.cost.observe(sequences, (), sequences, sequences * n, 1.0 + per_token * sequences * n)
    rule._tried[LINES], rule._kept[LINES] = 1e9, 1e9 * np.array(chances)
    rule.chances = rule._chances()
    return rule


def test_drafts_are_as_long_as_a_further_token_pays():
    # Of ten sequences 10, 19, 22.5 or 22.85 tokens are made in 1, 1.2, 1.4 or 1.6 seconds.
    assert chosen(known([0.9, 0.35 / 0.9, 0.1], 0.02), [3] * 10) == [2] * 10
    assert chosen(known([0.9, 0.25 / 0.9, 0.1], 0.02), [3] * 10) == [1] * 10
    assert chosen(known([0.9, 0.25 / 0.9, 0.1], 1e-5), [3] * 10) == [3] * 10
    # And drafts that end earlier are not lengthened.
    assert chosen(known([0.9, 0.9, 0.9], 1e-5), [3, 0, 1, 2]) == [3, 0, 1, 2]


def test_trees_are_verified_as_far_as_they_pay():
    """Ten sequences make 10, 15 or 17.5 tokens with lines, 10, 16 or 19.6 with trees of twice as many nodes."""
    tree = DraftTree.of([[0, 0], [1, 1]])
    for per_token, expected in ((0.002, tree), (0.01, tree.first_path), (0.035, tree.first_path.cut(1))):
        rule = known([0.5, 0.5], per_token, paths=2)
        rule._tried[TREES], rule._kept[TREES] = 1e9, 1e9 * np.array([0.6, 0.6])
        rule.chances = rule._chances()
        assert rule.choose([tree] * 10, 10, ()) == [expected] * 10


@pytest.mark.parametrize(("others", "per_token", "trees"), [(0.8, 0.002, True), (0.8, 0.03, False), (0.0, 0.02, False)])
def test_trees_are_verified_where_they_pay_more_than_lines(others, per_token, trees):
    engine = Engine(1.0, 0.0, 0.0, per_token, acceptance=0.6, paths=4, others=others)
    rule = DraftLengths(paths=4)
    for _ in range(600):
        engine.run(rule, 8)
    engine.drafted_steps = engine.tree_steps = 0
    for _ in range(300):
        engine.run(rule, 8)
    assert engine.drafted_steps > 250
    assert engine.tree_steps > 200 if trees else engine.tree_steps < 30


def test_trees_that_begin_to_pay_are_noticed_while_lines_are_verified():
    engine, rule = Engine(1.0, 0.0, 0.0, 0.003, acceptance=0.6, paths=4), DraftLengths(paths=4)
    steps = []
    for engine.others in (0.0, 0.9):
        for _ in range(800):
            engine.run(rule, 8)
        engine.tree_steps = 0
        for _ in range(200):
            engine.run(rule, 8)
        steps.append(engine.tree_steps)
    assert steps[0] < 30 and steps[1] > 150


@given(st.lists(st.integers(0, 8), min_size=1, max_size=40), st.floats(0, 0.2))
def test_choices_are_within_what_there_is(available, per_token):
    lengths = chosen(known([0.7] * 8, per_token), available)
    assert all(0 <= length <= n for length, n in zip(lengths, available, strict=True))


@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_costs_are_learned(noise):
    rng, cost = np.random.default_rng(0), StepCost()
    for step in range(600):
        sequences, reads = rng.integers(1, 60), rng.integers(2, 100, rng.integers(0, 4)).tolist()
        attempts = sequences * (step % 2)
        drafted = attempts * rng.integers(0, 9)
        seconds = 0.01 + 0.0005 * sequences + 0.001 * len(reads) + 0.0001 * sum(reads)
        seconds += 0.0002 * attempts + 0.00004 * drafted
        cost.observe(sequences, reads, attempts, drafted, seconds * (1 + noise * rng.standard_normal()))
    assert cost.plain(30, [40, 60]) == pytest.approx(0.037, rel=0.01 + noise)
    assert cost.extra(20, 100) == pytest.approx(0.008, rel=0.02 + 5 * noise)


def test_one_slow_step_is_no_new_cost():
    cost = StepCost()
    for _ in range(100):
        cost.observe(8, (), 0, 0, 0.01)
    assert cost.observe(8, (), 0, 0, 0.012) == pytest.approx(0.012, rel=1e-3)
    assert cost.observe(8, (), 0, 0, 5.0) < 0.04
    assert cost.plain(8, ()) < 0.011


def test_what_was_expected_to_take_no_time_is_learned_all_the_same():
    """Steps of 40 and 64 sequences let one expect that one of few takes less than nothing."""
    cost = StepCost()
    for step in range(100):
        cost.observe(*((40, (), 0, 0, 0.001) if step % 2 else (64, (), 0, 0, 0.01)))
    assert cost.plain(4, ()) == 0.0
    for _ in range(200):
        assert cost.observe(4, (), 0, 0, 0.005) > 0
    assert cost.plain(4, ()) > 0.001


def test_what_was_long_ago_is_forgotten():
    fit = DecayedLeastSquares(1, 20)
    for value in [1.0] * 200 + [3.0] * 100:
        fit.observe([1.0], value)
    assert fit.predict([1.0]) == pytest.approx(3.0, rel=0.02)

"""What each policy decides, and what holds of all of them, whatever happens."""

import heapq
import random

import pytest
from hypothesis import given, settings, strategies as st

from megatron_pbsd.rollout.length_context import LengthContext
from megatron_pbsd.rollout.length_model import LengthModel
from megatron_pbsd.rollout.policies.context_aware import ContextAware
from megatron_pbsd.rollout.policies.divided import Divided
from megatron_pbsd.rollout.policies.group_pinned import GroupPinned
from megatron_pbsd.rollout.policies.least_loaded import LeastLoaded
from megatron_pbsd.rollout.policies.longest_remaining import LongestRemaining
from megatron_pbsd.rollout.policies.oracle import Oracle, ToldOracle
from megatron_pbsd.rollout.scheduler import Assignment, Scheduler

LIMIT, CHUNK = 40, 8
DIVIDING = {
    "divided": lambda lengths: Divided(CHUNK, spread=1),
    "context_aware": lambda lengths: ContextAware(CHUNK, LengthContext(LIMIT), spread=1, turn_every=5),
    "longest_remaining": lambda lengths: LongestRemaining(CHUNK, LengthModel(LIMIT), turn_every=5),
    "oracle": lambda lengths: Oracle(CHUNK, lengths, spread=1),
    "told_oracle": lambda lengths: ToldOracle(CHUNK, LIMIT, lengths),
}
ALL = {"group_pinned": lambda lengths: GroupPinned(), "least_loaded": lambda lengths: LeastLoaded(), **DIVIDING}


def rollout(policy, lengths, engines, slots, kv_tokens, seed):
    """Run all requests, chunks ending in random order, engines coming and going; returns every assignment."""
    rng, scheduler = random.Random(seed), Scheduler(policy)
    alive = {f"e{i}" for i in range(engines)}
    for name in sorted(alive):
        scheduler.engine_joined(name, slots, kv_tokens)
    left, context, at, made = dict(lengths), dict.fromkeys(lengths, 5), {}, []

    def submit(request):
        generated = lengths[request] - left[request]
        scheduler.submitted(request, request.split("/")[0], context[request], LIMIT - generated)

    for request in lengths:
        submit(request)
    while left:
        for decision in scheduler.decisions():
            assert decision.request_id not in at and decision.request_id in left, "run twice, or after its end"
            at[decision.request_id] = decision
            made.append(decision)
        if policy.chunk_tokens is not None:
            for name in alive:
                needed = [context[r] + d.max_tokens for r, d in at.items() if d.engine == name]
                assert len(needed) <= slots and (sum(needed) <= kv_tokens or len(needed) == 1)
        if len(alive) > 1 and rng.random() < 0.05:
            name = rng.choice(sorted(alive))
            alive.remove(name)
            assert set(scheduler.engine_lost(name)) == {r for r, d in at.items() if d.engine == name}
            at = {r: d for r, d in at.items() if d.engine != name}
        elif len(alive) < engines:
            name = next(f"e{i}" for i in range(engines) if f"e{i}" not in alive)
            alive.add(name)
            scheduler.engine_joined(name, slots, kv_tokens)
        elif at:
            request = rng.choice(sorted(at))
            decision = at.pop(request)
            tokens = min(left[request], decision.max_tokens or left[request])
            left[request] -= tokens
            context[request] += tokens
            scheduler.chunk_finished(request, tokens)
            if left[request]:
                submit(request)
            else:
                del left[request]
                scheduler.request_finished(request)
    assert not list(scheduler.waiting) and not at
    return made


groups = st.lists(st.lists(st.integers(1, LIMIT), min_size=1, max_size=4), min_size=1, max_size=6).map(
    lambda drawn: {f"{g}/{i}": length for g, group in enumerate(drawn) for i, length in enumerate(group)})


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=40, deadline=None)
@given(groups, st.integers(1, 3), st.integers(1, 4), st.integers(30, 120), st.integers(0, 99))
def test_nothing_is_lost_or_twice_kv_is_kept_within_bounds_and_decisions_repeat(
        name, lengths, engines, slots, kv_tokens, seed):
    first = rollout(ALL[name](lengths), lengths, engines, slots, kv_tokens, seed)
    assert first == rollout(ALL[name](lengths), lengths, engines, slots, kv_tokens, seed)


@pytest.mark.parametrize("name", ["context_aware", "longest_remaining"])
def test_nobody_starves(name):
    """A stream of new groups about which nothing is known, and which so go first, on one slot."""
    policy = DIVIDING[name]({})
    scheduler = Scheduler(policy)
    scheduler.engine_joined("e", 1)
    for i in range(2):
        scheduler.submitted(f"old/{i}", "old", 5, LIMIT)
    placed = []
    for i in range(60):
        scheduler.submitted(f"new{i}/0", f"new{i}", 5, LIMIT)
        (decision,) = scheduler.decisions()
        placed.append(decision.request_id)
        scheduler.chunk_finished(decision.request_id, 1)
        scheduler.request_finished(decision.request_id)
    assert "old/1" in placed[:2 * 5 + 5]
    waited = [placed.index(f"new{i}/0") - i for i in range(10)]
    assert max(waited) <= 5 * 12


def test_first_come_first_served_within_divided():
    scheduler = Scheduler(Divided(CHUNK))
    scheduler.engine_joined("e", 1)
    for i in range(4):
        scheduler.submitted(f"{i}", "g", 5, LIMIT)
    order = []
    for _ in range(8):
        (decision,) = scheduler.decisions()
        order.append(decision.request_id)
        scheduler.chunk_finished(decision.request_id, CHUNK)
        if len(order) % 2:  # each is two chunks long: a begun one goes on before the next begins
            scheduler.submitted(decision.request_id, "g", 5 + CHUNK, LIMIT - CHUNK)
        else:
            scheduler.request_finished(decision.request_id)
    assert order == ["0", "0", "1", "1", "2", "2", "3", "3"]


def test_probes_first_and_then_the_longest_group():
    scheduler = Scheduler(ContextAware(CHUNK, LengthContext(LIMIT), turn_every=1000))
    scheduler.engine_joined("e", 2)
    for group in "ab":
        for i in range(3):
            scheduler.submitted(f"{group}/{i}", group, 5, LIMIT)
    assert [d.request_id for d in scheduler.decisions()] == ["a/0", "b/0"]
    for request, length in (("a/0", 3), ("b/0", 7)):
        scheduler.chunk_finished(request, length)
        scheduler.request_finished(request)
    assert [d.request_id for d in scheduler.decisions()] == ["b/1", "b/2"]
    scheduler.chunk_finished("b/1", 2)
    scheduler.request_finished("b/1")
    assert [d.request_id for d in scheduler.decisions()] == ["a/1"]


def test_a_long_sibling_raises_its_group_and_goes_on_before_others():
    scheduler = Scheduler(LongestRemaining(CHUNK, LengthModel(1000, share=0.9), turn_every=1000))
    scheduler.engine_joined("e", 4)
    for group in "ab":
        for i in range(2):
            scheduler.submitted(f"{group}/{i}", group, 5, 1000)
    assert {d.request_id for d in scheduler.decisions()} == {"a/0", "b/0", "a/1", "b/1"}
    for request in ("a/0", "b/0"):
        scheduler.chunk_finished(request, 8)
        scheduler.request_finished(request)
    for request, tokens in (("a/1", 8), ("b/1", 64)):
        scheduler.chunk_finished(request, tokens)
        scheduler.submitted(request, request[0], 5 + tokens, 1000 - tokens)
    assert [d.request_id for d in scheduler.decisions()] == ["b/1", "a/1"]


def test_groups_stay_together_and_are_dealt_evenly():
    scheduler = Scheduler(GroupPinned())
    for i in range(3):
        scheduler.engine_joined(f"e{i}", 1)
    for group in range(6):
        for i in range(4):
            scheduler.submitted(f"{group}/{i}", str(group), 5)
    at = {d.request_id: d.engine for d in scheduler.decisions()}
    assert len(at) == 24 and all(at[f"{g}/{i}"] == f"e{g % 3}" for g in range(6) for i in range(4))


def test_kv_moves_only_where_more_than_512_tokens_would_be_computed_again():
    for context, pulled in ((512, 0), (513, 513)):
        scheduler = Scheduler(Divided(CHUNK, spread=0))
        scheduler.engine_joined("a", 2)
        scheduler.submitted("r", "g", context, LIMIT)
        scheduler.submitted("s", "g", context, LIMIT)
        assert [d.engine for d in scheduler.decisions()] == ["a", "a"]
        scheduler.engine_joined("b", 2)
        scheduler.chunk_finished("r", CHUNK)
        scheduler.submitted("r", "g", context, LIMIT)
        assert scheduler.decisions() == [Assignment("r", "b", "a", CHUNK, pulled)]


def test_a_request_between_turns_holds_neither_slot_nor_memory():
    scheduler = Scheduler(Divided(CHUNK))
    scheduler.engine_joined("e", 1, 20)
    scheduler.submitted("r", "g", 10, LIMIT)
    assert scheduler.decisions()
    scheduler.submitted("s", "g", 12, LIMIT)
    assert not scheduler.decisions()
    scheduler.chunk_finished("r", 3)
    assert scheduler.decisions() == [Assignment("s", "e", None, CHUNK)]
    scheduler.chunk_finished("s", 3)
    scheduler.submitted("r", "g", 12, LIMIT)
    assert scheduler.decisions() == [Assignment("r", "e", None, CHUNK)], "its KV is still there: nothing is pulled"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=6), st.integers(1, 3))
def test_longest_first_is_within_four_thirds_of_the_best_schedule(tokens, engines):
    """Graham's bound for longest first, against the best of all assignments of whole requests to engines."""
    lengths = {str(i): n for i, n in enumerate(tokens)}
    scheduler = Scheduler(Oracle(100, lengths))
    for i in range(engines):
        scheduler.engine_joined(f"e{i}", 1)
    for request in lengths:
        scheduler.submitted(request, request, 1, 100)
    now, ends = 0, []
    while True:
        for decision in scheduler.decisions():
            heapq.heappush(ends, (now + lengths[decision.request_id], decision.request_id))
        if not ends:
            break
        now, request = heapq.heappop(ends)
        scheduler.chunk_finished(request, lengths[request])
        scheduler.request_finished(request)
    best = sum(tokens)
    for code in range(engines ** len(tokens)):
        loads = [0] * engines
        for n in tokens:
            loads[code % engines] += n
            code //= engines
        best = min(best, max(loads))
    assert best <= now <= best * (4 - 1 / engines) / 3 + 1e-9


def test_the_told_oracle_knows_a_group_when_one_of_it_has_finished():
    scheduler = Scheduler(ToldOracle(CHUNK, 1000, {"a/0": 8, "a/1": 8, "a/2": 800, "b/0": 900, "b/1": 9}))
    scheduler.engine_joined("e", 2)
    for request in ("a/0", "a/1", "a/2", "b/0", "b/1"):
        scheduler.submitted(request, request[0], 5, 1000)
    assert [d.request_id for d in scheduler.decisions()] == ["a/0", "b/0"]
    scheduler.chunk_finished("a/0", 8)
    scheduler.request_finished("a/0")
    # Nothing of b is known, so that it may be as long as the limit.
    assert [d.request_id for d in scheduler.decisions()] == ["b/1"]
    scheduler.chunk_finished("b/1", 9)
    scheduler.request_finished("b/1")
    assert [d.request_id for d in scheduler.decisions()] == ["a/2"]

"""Host memory for KV, by itself: against a plain account of what has been parked."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from megatron_pbsd.resharding.shared_folder import SharedFolder
from megatron_pbsd.resharding.shared_memory import ROOT, Segment
from megatron_pbsd.rollout.engines.embedded.kv_cache import common_prefix
from megatron_pbsd.rollout.engines.embedded.kv_pool import KVPool, PoolPlace

WIDTH, ROW = 12, 20
ENGINES = ("a", "b")
TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=8)


def content(tokens: list[int]) -> np.ndarray:
    """A token's row depends on all tokens up to it, as KV does."""
    rows = [np.random.default_rng([*tokens[: i + 1]]).integers(0, 256, WIDTH, np.uint8) for i in range(len(tokens))]
    return np.stack(rows)


class AnyUse(RuleBasedStateMachine):
    """Two engines that park, take, hand over and release requests, which are at one of them at a time."""

    requests = Bundle("requests")

    @initialize(budget=st.sampled_from([5 * ROW, 20 * ROW, 10_000]))
    def begin(self, budget):
        self.folder = SharedFolder()
        self.pools = {name: KVPool(PoolPlace(self.folder.path, budget, shared=True), name) for name in ENGINES}
        self.budget = budget
        self.parked: dict[tuple[str, str], list[int]] = {}

    def teardown(self):
        if hasattr(self, "folder"):
            self.folder.close()
            assert not Path(self.folder.path).exists()

    @rule(target=requests, name=st.sampled_from(["r0", "r1", "r2"]))
    def request(self, name):
        return name

    @rule(engine=st.sampled_from(ENGINES), request=requests, tokens=TOKENS)
    def park(self, engine, request, tokens):
        self.pools[engine].park(request, "form", tokens, lambda start, end: content(tokens)[start:end])
        self.parked[engine, request] = tokens
        if len(tokens) * ROW <= self.budget:
            assert self.pools[engine].find(request, "form", tokens) == len(tokens)

    @rule(engine=st.sampled_from(ENGINES), request=requests, tokens=TOKENS)
    def take(self, engine, request, tokens):
        other = ENGINES[1 - ENGINES.index(engine)]
        had = self.pools[other].find(request, "form", tokens)
        self.parked.pop((engine, request), None)
        theirs = self.parked.pop((other, request), None)
        if self.pools[engine].take(request, "form", tokens, WIDTH, other):
            self.parked[engine, request] = theirs[: common_prefix(theirs, tokens)]
        assert self.pools[engine].find(request, "form", tokens) == had
        self.pools[other].hand_over(request)

    @rule(engine=st.sampled_from(ENGINES), request=requests)
    def release(self, engine, request):
        self.pools[engine].release(request)
        self.parked.pop((engine, request), None)

    @rule(engine=st.sampled_from(ENGINES))
    def clear(self, engine):
        self.pools[engine].clear()
        self.parked = {key: tokens for key, tokens in self.parked.items() if key[0] != engine}

    @rule(engine=st.sampled_from(ENGINES), request=requests, tokens=TOKENS)
    def look_up(self, engine, request, tokens):
        pool, known = self.pools[engine], self.parked.get((engine, request), [])
        assert pool.find(request, "other form", tokens) == 0
        found = pool.find(request, "form", tokens)
        assert found in (0, common_prefix(known, tokens))  # room may have been short
        if found:
            np.testing.assert_array_equal(pool.read(request, 0, found), content(tokens[:found]))

    @invariant()
    def within_budget(self):
        for name, pool in getattr(self, "pools", {}).items():
            files = list(Path(self.folder.path, name).iterdir())
            assert sum(path.stat().st_size for path in files) == pool.counters.bytes <= self.budget


TestAnyUse = AnyUse.TestCase


@pytest.fixture
def folder():
    with SharedFolder() as folder:
        yield folder


def pools(folder, budget=10_000):
    return [KVPool(PoolPlace(folder.path, budget, shared=True), name) for name in ENGINES]


def test_only_what_is_new_is_copied(folder):
    pool, asked = pools(folder)[0], []

    def rows(tokens):
        return lambda start, end: asked.append((start, end)) or content(tokens)[start:end]

    for tokens in ([1, 2], [1, 2, 3, 4], [1, 2, 9]):
        pool.park("r", "form", tokens, rows(tokens))
        np.testing.assert_array_equal(pool.read("r", 0, len(tokens)), content(tokens))
    assert asked == [(0, 2), (2, 4), (2, 3)]


def test_the_longest_untouched_goes_first(folder):
    pool = pools(folder, budget=4 * ROW)[0]
    for name in ("old", "new", "newest"):
        pool.park(name, "form", [1, 2], lambda start, end: content([1, 2])[start:end])
    assert [pool.find(name, "form", [1, 2]) for name in ("old", "new", "newest")] == [0, 2, 2]
    assert pool.counters.dropped_tokens == 2
    pool.park("huge", "form", [1] * 5, lambda start, end: content([1] * 5)[start:end])
    assert "huge" not in pool and pool.counters.dropped_tokens == 7
    assert pool.find("new", "form", [1, 2]) == 2, "what could never fit drops nothing"


def test_a_row_that_its_writer_did_not_finish_is_left_out(folder):
    ours, theirs = pools(folder)
    tokens = [1, 2, 3]
    theirs.park("r", "form", tokens, lambda start, end: content(tokens)[start:end])
    (path,) = Path(folder.path, "b").iterdir()
    os.truncate(path, 2 * ROW + 7)
    assert ours.take("r", "form", tokens, WIDTH, "b")
    assert ours.find("r", "form", tokens) == 2
    np.testing.assert_array_equal(ours.read("r", 0, 2), content([1, 2]))


def test_an_engine_that_starts_anew_has_nothing(folder):
    first, _ = pools(folder)
    first.park("r", "form", [1], lambda start, end: content([1]))
    again, other = pools(folder)
    assert again.find("r", "form", [1]) == 0 and not other.take("r", "form", [1], WIDTH, "a")


def test_a_file_that_went_away_is_written_anew(folder):
    """Nothing but a disorder of calls can bring that about; it must not become wrong KV."""
    ours, theirs = pools(folder)
    ours.park("r", "form", [1, 2], lambda start, end: content([1, 2])[start:end])
    assert theirs.take("r", "form", [1, 2], WIDTH, "a")
    assert ours.find("r", "form", [1, 2]) == 0
    ours.park("r", "form", [1, 2, 3], lambda start, end: content([1, 2, 3])[start:end])
    np.testing.assert_array_equal(ours.read("r", 0, 3), content([1, 2, 3]))


def test_what_was_handed_over_and_not_fetched_is_written_anew(folder):
    """The engine that was to fetch it died, and the request came back."""
    ours, theirs = pools(folder)
    ours.park("r", "form", [1, 2], lambda start, end: content([1, 2])[start:end])
    ours.hand_over("r")
    ours.park("r", "form", [1, 2, 3], lambda start, end: content([1, 2, 3])[start:end])
    assert ours.counters.bytes == 3 * ROW
    assert theirs.take("r", "form", [1, 2, 3], WIDTH, "a")
    np.testing.assert_array_equal(theirs.read("r", 0, 3), content([1, 2, 3]))


def test_a_host_without_memory_keeps_nothing(folder):
    pool = pools(folder)[0]
    pool.park("r", "form", [1], lambda start, end: content([1]))
    os.rmdir(Path(folder.path, "b"))
    for path in Path(folder.path, "a").iterdir():
        path.unlink()
    os.rmdir(Path(folder.path, "a"))  # any failure to write looks like this one
    pool.park("r", "form", [1, 2], lambda start, end: content([1, 2])[start:end])
    assert "r" not in pool and (pool.counters.bytes, pool.counters.dropped_tokens) == (0, 2)


def test_folders_of_the_dead_are_swept():
    dead = ROOT / "pbsd-999999999-left"
    dead.mkdir()
    (dead / "file").write_bytes(b"x")
    Segment(1).close()
    assert not dead.exists()

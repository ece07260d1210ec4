from __future__ import annotations

from hypothesis import given, strategies as st

from megatron_pbsd.rollout.drafting.exchange import Exchange
from megatron_pbsd.rollout.drafting.groups import DraftGroups
from megatron_pbsd.rollout.engines.protocol import Chunk, SiblingTokens


def test_what_was_seen_is_not_told_again():
    exchange = Exchange()
    first = Chunk("1/0/0", (1, 2), 3, seed=0, group_id="1/0")
    second = Chunk("1/0/1", (1, 2), 3, seed=0, group_id="1/0")
    assert exchange.sent("a", first) == first
    exchange.returned("a", "1/0/0", (5, 6))
    assert exchange.sent("b", second).siblings == (SiblingTokens("1/0/0", 0, (1, 2, 5, 6)),)
    exchange.returned("b", "1/0/1", (7,))
    # Where a sibling ran, what it did is known.
    assert exchange.sent("a", Chunk("1/0/0", (1, 2, 5, 6), 3, seed=0, group_id="1/0")).siblings == (
        SiblingTokens("1/0/1", 0, (1, 2, 7)),)
    exchange.returned("a", "1/0/0", (8,))
    moved = exchange.sent("b", Chunk("1/0/0", (1, 2, 5, 6, 8, 9), 3, seed=0, group_id="1/0"))
    assert moved.siblings == ()
    exchange.lost("a")
    assert len(exchange.sent("a", second).siblings) == 1
    assert exchange.sent("a", Chunk("1/1/0", (4,), 3, seed=0, group_id="1/1")).siblings == ()


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3), st.lists(st.integers(0, 4), max_size=4)), max_size=40))
def test_engines_come_to_know_whole_siblings(events):
    """Whichever engine runs whose chunks: after a chunk of the group has come, all that was finished is known there."""
    exchange, engines = Exchange(), [DraftGroups() for _ in range(3)]
    contexts = {f"{i}": (9, 9) for i in range(4)}
    for engine in engines:
        engine.register("g")
    for at, member, generated in events:
        engine, name = engines[at], str(member)
        chunk = exchange.sent(str(at), Chunk(name, contexts[name], 4, seed=0, group_id="g"))
        for told in chunk.siblings:
            engine.update("g", told.request_id, told.start, told.tokens)
        contexts[name] += tuple(generated)
        engine.update("g", name, engine.known("g", name), contexts[name][engine.known("g", name) :])
        exchange.returned(str(at), name, generated)
        started = [name for name in contexts if len(contexts[name]) > 2]
        assert all(engine.known("g", name) == len(contexts[name]) for name in started)
        contexts[name] += (8,)  # an observation, which nobody knows before the next chunk
        exchange.sent(str(at), Chunk(name, contexts[name], 4, seed=0, group_id="g"))
        engine.update("g", name, engine.known("g", name), contexts[name][engine.known("g", name) :])

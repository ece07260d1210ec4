"""A chunk that goes on from KV that was parked, moved or copied from a sibling gives what it would have given."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.torch import load_file

from megatron_pbsd.resharding.shared_folder import SharedFolder
from megatron_pbsd.rollout.engines.embedded.kv_pool import PoolPlace
from megatron_pbsd.rollout.engines.protocol import Chunk

KINDS = ["qwen3", "qwen3_moe", "deepseek_v3"]
PROMPT = tuple(range(20, 70))


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def pooled(make_engine):
    """Engines that share a pool."""
    with SharedFolder() as folder:
        def make(family="qwen3", *, budget=2**22, shared=True, **arguments):
            return make_engine(family, kv_pool=PoolPlace(folder.path, budget, shared), **arguments)

        yield make


def ask(engine, tokens, new, routed_from=None, request_id="r", **chunk):
    engine.submit([Chunk(request_id, tuple(tokens), new, seed=3, routed_from=routed_from, **chunk)])
    (result,) = engine.collect()
    return result


def same(result, expected):
    """Bit by bit."""
    assert (result.tokens, result.log_probs) == (expected.tokens, expected.log_probs)
    if expected.routed_experts is None:
        assert result.routed_experts is None
    else:
        assert result.routed_from == expected.routed_from
        np.testing.assert_array_equal(result.routed_experts, expected.routed_experts)


def first_and_second(engine):
    """Two chunks of a trajectory, with an observation in between that has been read by neither."""
    first = ask(engine, PROMPT, 9, 0)
    context = PROMPT + first.tokens + (5, 6, 7)
    return first, context, ask(engine, context, 9, len(PROMPT) + 8)


def test_going_on_after_the_slot_was_lost(pooled, kind):
    first, context, expected = first_and_second(pooled(kind))
    engine = pooled(kind, slots=1, shared=False)
    same(ask(engine, PROMPT, 9, 0), first)
    ask(engine, range(80), 3, request_id="takes the slot")
    statistics = engine.statistics()
    assert (statistics.kv.parks, statistics.kv.parked_tokens) == (1, len(PROMPT) + 8)
    result = ask(engine, context, 9, len(PROMPT) + 8)
    same(result, expected)
    assert result.cached_tokens == len(PROMPT) + 8
    counters = engine.statistics().kv
    assert (counters.restored, counters.restored_tokens, counters.slot_tokens) == (1, len(PROMPT) + 8, 0)
    engine.release(["r", "takes the slot"])
    assert engine.statistics().kv.bytes == 0


def test_going_on_at_another_engine(pooled, kind):
    first, context, expected = first_and_second(pooled(kind))
    ours, theirs = pooled(kind, name="ours"), pooled(kind, name="theirs")
    ask(theirs, (1, 2), 3, 0, request_id="another")  # experts are recorded from now on
    same(ask(ours, PROMPT, 9, 0), first)
    ours.hand_over(["r"])
    assert (ours.statistics().kv.bytes, ours.statistics().kv.moved_out) == (0, 1)
    assert ours.statistics().cached_requests == 0
    result = ask(theirs, context, 9, len(PROMPT) + 8, kv_from="ours")
    same(result, expected)
    assert result.cached_tokens == len(PROMPT) + 8
    assert (theirs.statistics().kv.moved_in, theirs.statistics().kv.moved_in_tokens) == (1, len(PROMPT) + 8)
    # And back, with what was added since.
    theirs.hand_over(["r"])
    longer = context + result.tokens
    again = ask(ours, longer, 5, kv_from="theirs")
    assert again.cached_tokens == len(longer) - 1
    assert theirs.statistics().kv.bytes > 0, "other requests are still there"
    theirs.release(["another"])
    assert theirs.statistics().kv.bytes == 0


def test_a_dead_engines_kv_is_found_by_the_living(pooled):
    _, context, expected = first_and_second(pooled())
    dead, living = pooled(name="dead"), pooled(name="living")
    ask(dead, PROMPT, 9)
    del dead
    result = ask(living, context, 9, len(PROMPT) + 8, kv_from="dead")
    assert result.tokens == expected.tokens and result.cached_tokens == len(PROMPT) + 8


@pytest.mark.parametrize("budget", [0, 600])
def test_without_room_it_is_computed_again(pooled, budget):
    _, context, expected = first_and_second(pooled())
    engine = pooled(slots=1, budget=budget)
    ask(engine, PROMPT, 9)
    ask(engine, range(80), 3, request_id="takes the slot")
    result = ask(engine, context, 9)
    assert result.tokens == expected.tokens and result.cached_tokens == 0
    np.testing.assert_allclose(result.log_probs, expected.log_probs, atol=1e-5)
    assert engine.statistics().kv.bytes <= budget


def test_new_weights_outdate_what_is_parked(pooled, folders, publish):
    ours, theirs = pooled(name="ours"), pooled(name="theirs")
    context = PROMPT + ask(ours, PROMPT, 9).tokens
    assert ours.statistics().kv.bytes > 0
    tensors = {name: tensor * 1.5 for name, tensor in load_file(folders["qwen3"] / "model.safetensors").items()}
    manifest = publish(tensors)
    theirs.update_weights(manifest, version=1)
    outdated = ask(theirs, context, 5, kv_from="ours")
    assert outdated.cached_tokens == 0, "parked under other weights"
    ours.update_weights(manifest, version=1)
    assert ours.statistics().kv.bytes == 0
    again = ask(ours, context, 5)
    assert again.cached_tokens == 0 and again.tokens == outdated.tokens


@pytest.mark.parametrize("slots", [8, 3, 1])
def test_a_groups_prompt_is_computed_once(make_engine, kind, slots):
    alone, together = make_engine(kind, slots=8), make_engine(kind, slots=slots)

    def chunks(group):
        return [Chunk(f"r{i}", PROMPT, 4 + 3 * i, seed=3, routed_from=0, group_id=group) for i in range(4)]

    alone.submit(chunks(""))
    together.submit(chunks("g"))
    expected, results = ({r.request_id[-1]: r for _ in range(4) for r in engine.collect()}
                         for engine in (alone, together))
    for name, result in results.items():
        assert result.tokens == expected[name].tokens
        np.testing.assert_allclose(result.log_probs, expected[name].log_probs, atol=1e-5)
        if expected[name].routed_experts is not None:
            np.testing.assert_array_equal(result.routed_experts, expected[name].routed_experts)
    assert alone.statistics().prefilled_tokens == 4 * len(PROMPT)
    # All but the last token, whose logits are needed.
    assert together.statistics().kv.sibling_tokens == 3 * (len(PROMPT) - 1)
    assert together.statistics().prefilled_tokens == len(PROMPT) + 3


def test_siblings_share_what_they_have_in_common_and_nothing_else(make_engine):
    engine, alone = make_engine(), make_engine()
    fork = PROMPT[:30] + (1, 2, 3)
    stranger = PROMPT[:10] + (4,)
    for request_id, tokens, cached in [("a", PROMPT, 0), ("b", fork, 30), ("c", stranger, 0)]:
        chunk = Chunk(request_id, tokens, 6, seed=3, group_id="g")
        engine.submit([chunk])
        alone.submit([chunk])
        (result,), (expected,) = engine.collect(), alone.collect()
        alone.release([request_id])
        assert result.cached_tokens == cached and result.tokens == expected.tokens
    engine.submit([Chunk("d", PROMPT, 6, seed=3, group_id="another")])
    assert engine.collect()[0].cached_tokens == 0

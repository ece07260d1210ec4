"""Drafts change neither tokens nor log-probs, nor anything else that a chunk reports."""

from __future__ import annotations

import random
from itertools import count

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from megatron_pbsd.rollout.engines.embedded.speculation import Speculation
from megatron_pbsd.rollout.engines.protocol import Chunk, SiblingTokens


def drain(engine):
    results = {}
    while ended := engine.collect():
        results |= {result.request_id: result for result in ended}
    return results


def same(results, expected):
    assert results.keys() == expected.keys()
    for name, result in results.items():
        plain = expected[name]
        assert (result.tokens, result.finish_reason, result.versions) == (
            plain.tokens, plain.finish_reason, plain.versions)
        np.testing.assert_allclose(result.log_probs, plain.log_probs, atol=1e-5)


def groups_of(prompts, *, seed=0, new_tokens=40, temperature=0.7, **others):
    """Four members of each prompt. Low temperatures repeat themselves, and each other."""
    return [Chunk(f"{g}/{i}", prompt, new_tokens - i, seed=seed, temperature=temperature, group_id=str(g), **others)
            for g, prompt in enumerate(prompts) for i in range(4)]


@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("some_family", ["qwen3", "qwen3_moe", "deepseek_v3"])
def test_tokens_and_log_probs_are_those_without_drafts(make_engine, prompts, some_family, temperature):
    chunks = groups_of(prompts[:8:2], temperature=temperature, stop_token_ids=(7,))
    plain, drafting = make_engine(some_family), make_engine(some_family, speculation=Speculation(8, always=True))
    for engine in (plain, drafting):
        engine.submit(chunks)
    same(drain(drafting), drain(plain))
    statistics, without = drafting.statistics(), plain.statistics()
    assert statistics.generated_tokens == without.generated_tokens
    assert 0 < statistics.accepted_tokens < statistics.drafted_tokens
    assert statistics.decode_steps < without.decode_steps or temperature == 1.0
    assert without.drafted_tokens == 0


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_random_loads(make_engine, data):
    """Any slots, chunks, drafts, limits and stop tokens, aborts and forgotten contexts in between."""
    draw = data.draw
    slots, longest, total = draw(st.integers(1, 6)), draw(st.integers(1, 8)), draw(st.integers(1, 40))
    temperature, stop = draw(st.sampled_from([0.0, 0.5, 1.0])), draw(st.integers(0, 95))
    order = random.Random(draw(st.integers(0, 99)))
    starts = [tuple(draw(st.lists(st.integers(0, 95), min_size=1, max_size=40))) for _ in range(3)]

    def roll_out(engine, cut):
        """Token ids and log-probs of each request, in chunks of any length."""
        tokens, log_probs, open_ = {}, {}, {f"{g}/{i}" for g in range(3) for i in range(3)}
        running = set()
        while open_:
            for name in sorted(open_ - running):
                known = tokens.setdefault(name, ())
                chunk = Chunk(name, starts[int(name[0])] + known, cut(total - len(known)), seed=3,
                              temperature=temperature, stop_token_ids=(stop,), group_id=name[0])
                engine.submit([chunk])
                running.add(name)
            engine.abort([name for name in sorted(running) if cut(9) == 1])
            for result in engine.collect():
                name = result.request_id
                running.discard(name)
                tokens[name] += result.tokens
                log_probs[name] = log_probs.get(name, ()) + result.log_probs
                if result.finish_reason == "stop" or len(tokens[name]) == total:
                    open_.discard(name)
                if cut(4) == 1:
                    engine.release([name])
        return tokens, log_probs

    expected, expected_log_probs = roll_out(make_engine(max_context=128), lambda n: n)
    engine = make_engine(slots=slots, max_context=128, speculation=Speculation(longest, always=True))
    tokens, log_probs = roll_out(engine, lambda n: order.randint(1, n))
    assert tokens == expected
    for name, values in log_probs.items():
        np.testing.assert_allclose(values, expected_log_probs[name], atol=1e-5)


def test_the_rule_drafts_by_the_clock_it_is_given(make_engine, prompts):
    """By this one each step takes as long, so that drafts cost nothing once they are tried."""
    chunks = groups_of(prompts[:4:2], temperature=0.0, new_tokens=60)
    plain, drafting = make_engine(), make_engine(speculation=Speculation(8, clock=count().__next__))
    for engine in (plain, drafting):
        engine.submit(chunks)
    same(drain(drafting), drain(plain))
    assert drafting.statistics().decode_steps < 0.9 * plain.statistics().decode_steps


def test_experts_are_those_of_the_pass_in_use(make_engine, prompts):
    chunks = groups_of(prompts[1:3], temperature=0.3, routed_from=0)
    plain = make_engine("qwen3_moe")
    drafting = make_engine("qwen3_moe", speculation=Speculation(8, always=True))
    for engine in (plain, drafting):
        engine.submit(chunks)
    expected, results = drain(plain), drain(drafting)
    assert drafting.statistics().accepted_tokens > 0
    for name, result in results.items():
        np.testing.assert_array_equal(result.routed_experts, expected[name].routed_experts)


def test_a_chunk_never_outgrows_the_context(make_engine):
    engine = make_engine(max_context=40, slots=2, speculation=Speculation(8, always=True))
    engine.submit([Chunk("a", (1, 2, 3) * 6, 100, seed=0, temperature=0.0)])
    (result,) = engine.collect()
    assert len(result.tokens) == 22 and result.finish_reason == "length"


def test_siblings_of_other_engines_are_drafted_from(make_engine, prompts):
    alone = make_engine(speculation=Speculation(8, always=True))
    first, second = groups_of(prompts[3:4], temperature=0.0, new_tokens=30)[:2]
    alone.submit([first])
    (sibling,) = alone.collect()
    engine = make_engine(speculation=Speculation(8, always=True))
    told = SiblingTokens("0/0", 0, first.tokens + sibling.tokens)
    unusable = SiblingTokens("0/9", 5, (1, 2, 3))
    engine.submit([Chunk(**{**vars(second), "siblings": (told, unusable)})])
    (result,) = engine.collect()
    # A greedy member says what its sibling said: eight tokens and one more at every step.
    assert result.tokens == sibling.tokens[:29]
    assert engine.statistics().decode_steps <= 5


def test_new_weights_under_a_running_chunk(make_engine, publish, reference, prompts):
    published = publish({name: tensor for name, tensor in reference().state_dict().items() if name != "lm_head.weight"})
    results = []
    for speculation in (None, Speculation(4, always=True)):
        engine = make_engine(slots=4, speculation=speculation)
        engine.submit(groups_of(prompts[2:3], temperature=0.3))
        # It ends first, being the shortest, and leaves the others running.
        ended = engine.collect()
        engine.update_weights(published, 5)
        results.append({result.request_id: result for result in ended} | drain(engine))
    plain, drafted = results
    assert {n: (r.tokens, r.finish_reason) for n, r in drafted.items()} == {
        n: (r.tokens, r.finish_reason) for n, r in plain.items()}
    assert all(sum(v.end - v.start for v in r.versions) == len(r.tokens) for r in drafted.values())
    assert any(len(r.versions) == 2 for r in drafted.values())

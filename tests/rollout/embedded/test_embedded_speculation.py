"""Drafts change neither tokens nor log-probs, nor anything else that a chunk reports."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import count

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from megatron_pbsd.resharding.shared_folder import SharedFolder
from megatron_pbsd.rollout.drafting.acceptance import Trace, acceptance
from megatron_pbsd.rollout.engines.embedded.kv_pool import PoolPlace
from megatron_pbsd.rollout.engines.embedded.speculation import LEAST_CHANCE, Speculation
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


@pytest.fixture(params=[1, 2, 4], ids="{} paths".format)
def paths(request) -> int:
    return request.param


@pytest.fixture
def always(paths):
    """What drafts so many paths of so many tokens whenever there are any."""
    return lambda longest=8: Speculation(longest, paths, always=True)


@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("some_family", ["qwen3", "qwen3_moe", "deepseek_v3"])
def test_tokens_and_log_probs_are_those_without_drafts(make_engine, always, prompts, some_family, temperature):
    chunks = groups_of(prompts[:8:2], temperature=temperature, stop_token_ids=(7,))
    plain, drafting = make_engine(some_family), make_engine(some_family, speculation=always())
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
    paths = draw(st.integers(1, 5))
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
    with SharedFolder() as folder:
        engine = make_engine(slots=slots, max_context=128, speculation=Speculation(longest, paths, always=True),
                             kv_pool=PoolPlace(folder.path, 2**22, shared=False))
        tokens, log_probs = roll_out(engine, lambda n: order.randint(1, n))
    assert tokens == expected
    for name, values in log_probs.items():
        np.testing.assert_allclose(values, expected_log_probs[name], atol=1e-5)


def test_the_rule_drafts_by_the_clock_it_is_given(make_engine, paths, prompts):
    """By this one each step takes as long, so that drafts cost nothing once they are tried."""
    chunks = groups_of(prompts[:4:2], temperature=0.0, new_tokens=60)
    plain, drafting = make_engine(), make_engine(speculation=Speculation(8, paths, clock=count().__next__))
    for engine in (plain, drafting):
        engine.submit(chunks)
    same(drain(drafting), drain(plain))
    assert drafting.statistics().decode_steps < 0.9 * plain.statistics().decode_steps


def test_experts_are_those_of_the_pass_in_use(make_engine, always, prompts):
    chunks = groups_of(prompts[1:3], temperature=0.3, routed_from=0)
    plain = make_engine("qwen3_moe")
    drafting = make_engine("qwen3_moe", speculation=always())
    for engine in (plain, drafting):
        engine.submit(chunks)
    expected, results = drain(plain), drain(drafting)
    assert drafting.statistics().accepted_tokens > 0
    for name, result in results.items():
        np.testing.assert_array_equal(result.routed_experts, expected[name].routed_experts)


def test_a_chunk_never_outgrows_the_context(make_engine, always):
    engine = make_engine(max_context=40, slots=2, speculation=always())
    engine.submit([Chunk("a", (1, 2, 3) * 6, 100, seed=0, temperature=0.0)])
    (result,) = engine.collect()
    assert len(result.tokens) == 22 and result.finish_reason == "length"


def test_siblings_of_other_engines_are_drafted_from(make_engine, always, prompts):
    alone = make_engine(speculation=always())
    first, second = groups_of(prompts[3:4], temperature=0.0, new_tokens=30)[:2]
    alone.submit([first])
    (sibling,) = alone.collect()
    engine = make_engine(speculation=always())
    told = SiblingTokens("0/0", 0, first.tokens + sibling.tokens)
    unusable = SiblingTokens("0/9", 5, (1, 2, 3))
    engine.submit([replace(second, siblings=(told, unusable))])
    (result,) = engine.collect()
    # A greedy member says what its sibling said: eight tokens and one more at every step.
    assert result.tokens == sibling.tokens[:29]
    assert engine.statistics().decode_steps <= 5


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_a_chunk_that_ends_within_a_path_is_gone_on_with(make_engine, always, paths, prompts, family):
    """Of what is told, the wrong continuation is the more frequent one: the right one is beside the first path."""
    prompt, plain, drafting = prompts[4], make_engine(family), make_engine(family, speculation=always())
    plain.submit([Chunk("unbounded", prompt, 30, seed=0, temperature=0.0)])
    right = plain.collect()[0].tokens
    wrong = right[:1] + tuple((token + 1) % 96 for token in right[1:])
    told = tuple(SiblingTokens(name, 0, prompt + tokens) for name, tokens in zip("abc", (wrong, wrong, right)))
    last = next(i for i in range(4, 9) if right[i] not in right[:i])
    first = Chunk("r", prompt, 30, seed=0, temperature=0.0, stop_token_ids=(right[last],), group_id="g",
                  siblings=told, routed_from=0)
    second = replace(first, tokens=prompt + right[: last + 1] + (1, 2, 3), max_new_tokens=20, stop_token_ids=())
    for chunk in (first, second):
        results = []
        for engine in (plain, drafting):
            engine.submit([chunk])
            results += engine.collect()
        expected, result = results
        same({"r": result}, {"r": expected})
        assert result.cached_tokens == expected.cached_tokens
        np.testing.assert_array_equal(result.routed_experts, expected.routed_experts)
        if chunk is first:
            assert result.finish_reason == "stop" and len(result.tokens) == last + 1
            assert paths == 1 or drafting.statistics().decode_steps == 2


@pytest.mark.parametrize("siblings", [1, 3])
def test_as_much_is_accepted_as_acceptance_finds(make_engine, always, paths, prompts, siblings):
    """Members that generate one after the other; each is told of those that `acceptance` takes for it."""
    members = groups_of(prompts[4:5], temperature=0.4)
    alone = make_engine()
    alone.submit(members)
    generated = drain(alone)
    whole = [chunk.tokens + generated[chunk.request_id].tokens for chunk in members]
    # The first token comes of reading the prompt.
    found = acceptance([Trace(tokens, ((len(members[0].tokens) + 1, len(tokens)),)) for tokens in whole], siblings,
                       width=paths, least=LEAST_CHANCE)
    engine = make_engine(speculation=always())
    for i, chunk in enumerate(members):
        told = [SiblingTokens(f"{k}", 0, whole[(i + 1 + k) % 4]) for k in range(siblings)]
        engine.submit([replace(chunk, group_id=f"of {i}", siblings=tuple(told))])
        assert engine.collect()[0].tokens == generated[chunk.request_id].tokens
    statistics = engine.statistics()
    assert statistics.decode_steps == found.passes + len(members)
    assert (statistics.accepted_tokens, statistics.drafted_tokens) == (found.tokens - found.passes, found.drafted)


def test_new_weights_under_a_running_chunk(make_engine, always, publish, reference, prompts):
    published = publish({name: tensor for name, tensor in reference().state_dict().items() if name != "lm_head.weight"})
    results = []
    for speculation in (None, always(4)):
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

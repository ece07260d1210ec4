from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_pbsd.rollout.engines.embedded.engine import EmbeddedEngine
from megatron_pbsd.rollout.engines.protocol import Chunk, ChunkResult, EngineError


def drain(engine: EmbeddedEngine) -> dict[str, ChunkResult]:
    results = {}
    while ended := engine.collect():
        results |= {result.request_id: result for result in ended}
    return results


def forward_log_probs(model, tokens) -> np.ndarray:
    """Log-prob of each token after the first, from one full forward pass of transformers."""
    with torch.no_grad():
        log_probs = torch.log_softmax(model(torch.tensor([tokens])).logits[0], dim=-1)
    return log_probs[:-1].gather(1, torch.tensor(tokens[1:])[:, None]).squeeze(1).numpy()


def test_greedy_equals_generate(make_engine, reference, family, prompts):
    engine, model = make_engine(family, slots=5), reference(family)
    engine.submit([Chunk(f"r{i}", p, 12, seed=0, temperature=0.0) for i, p in enumerate(prompts)])
    results = drain(engine)
    for i, prompt in enumerate(prompts):
        generated = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert results[f"r{i}"].tokens == tuple(generated[0, len(prompt) :].tolist())


def test_log_probs_equal_full_forward(make_engine, reference, family, prompts):
    engine, model = make_engine(family), reference(family)
    engine.submit([Chunk(f"r{i}", p, 20, seed=3, temperature=0.7) for i, p in enumerate(prompts)])
    for name, result in drain(engine).items():
        prompt = prompts[int(name[1:])]
        expected = forward_log_probs(model, prompt + result.tokens)[len(prompt) - 1 :]
        np.testing.assert_allclose(result.log_probs, expected, atol=1e-5)


def test_score_equals_full_forward(make_engine, reference, family):
    engine, model = make_engine(family), reference(family)
    generator = torch.Generator().manual_seed(2)
    sequences = [torch.randint(96, (n,), generator=generator).tolist() for n in (1, 2, 130, 31, 700, 64, 5)]
    for tokens, scores in zip(sequences, engine.score(sequences), strict=True):
        assert scores.dtype == np.float32 and scores.shape == (len(tokens),) and scores[0] == 0
        np.testing.assert_allclose(scores[1:], forward_log_probs(model, tokens), atol=1e-5)


def test_continuation_after_observation_equals_from_scratch(make_engine, reference):
    engine, scratch, model = make_engine(), make_engine(), reference()
    context, observation = (5, 6, 7, 8), (40, 41, 42)
    for turn in range(4):
        chunk = Chunk("r", context, 6, seed=1)
        engine.submit([chunk])
        scratch.submit([chunk])
        (result,), (expected,) = engine.collect(), scratch.collect()
        scratch.release(["r"])
        assert result.tokens == expected.tokens
        np.testing.assert_allclose(
            result.log_probs, forward_log_probs(model, context + result.tokens)[len(context) - 1 :], atol=1e-5
        )
        # All but the last token of the previous turn and its observation had their KV.
        assert result.cached_tokens == (0 if turn == 0 else len(context) - len(observation) - 1)
        assert expected.cached_tokens == 0
        context += result.tokens + observation


def test_diverging_continuation_reuses_the_common_prefix_only(make_engine, reference):
    engine, model = make_engine(), reference()
    engine.submit([Chunk("r", tuple(range(20)), 4, seed=0)])
    engine.collect()
    other = (*range(10), *range(50, 60))
    engine.submit([Chunk("r", other, 4, seed=0)])
    (result,) = engine.collect()
    assert result.cached_tokens == 10
    np.testing.assert_allclose(result.log_probs, forward_log_probs(model, other + result.tokens)[19:], atol=1e-5)


def test_eviction_of_the_least_recently_used(make_engine):
    engine = make_engine(slots=2)
    for name in ("a", "b", "c"):
        engine.submit([Chunk(name, (1, 2, 3), 4, seed=0)])
        engine.collect()
    assert engine.statistics().cached_requests == 2
    engine.submit([Chunk("b", (1, 2, 3), 4, seed=0)])
    assert engine.collect()[0].cached_tokens == 2
    engine.submit([Chunk("a", (1, 2, 3), 4, seed=0)])
    assert engine.collect()[0].cached_tokens == 0
    engine.release(["a", "b", "unknown"])
    assert engine.statistics().cached_requests == 0


def test_more_chunks_than_slots_and_late_submission(make_engine, prompts):
    engine = make_engine(slots=3)
    engine.submit([Chunk(f"r{i}", p, 1 + i, seed=0) for i, p in enumerate(prompts[:8])])
    results = {r.request_id: r for r in engine.collect()}
    statistics = engine.statistics()
    assert statistics.running <= 3 and statistics.running + statistics.waiting == 8 - len(results)
    engine.submit([Chunk("late", (1, 2), 2, seed=0)])
    results |= drain(engine)
    assert {n: len(r.tokens) for n, r in results.items()} == {f"r{i}": 1 + i for i in range(8)} | {"late": 2}
    statistics = engine.statistics()
    assert (statistics.running, statistics.waiting) == (0, 0)
    assert statistics.generated_tokens == sum(range(1, 9)) + 2
    assert statistics.prefilled_tokens == sum(map(len, prompts[:8])) + 2
    assert statistics.busy_seconds > 0
    assert engine.collect() == []


def test_stop_token_is_part_of_the_result(make_engine):
    engine = make_engine()
    engine.submit([Chunk("free", (1, 2, 3), 20, seed=0)])
    (free,) = engine.collect()
    stop = free.tokens[7]
    engine.release(["free"])
    engine.submit([Chunk("free", (1, 2, 3), 20, seed=0, stop_token_ids=(stop,))])
    (stopped,) = engine.collect()
    assert free.finish_reason == "length" and stopped.finish_reason == "stop"
    assert stopped.tokens == free.tokens[: free.tokens.index(stop) + 1]
    assert len(stopped.log_probs) == len(stopped.tokens)


def test_abort_returns_what_was_generated(make_engine):
    engine = make_engine(slots=2)
    engine.submit([Chunk("short", (1, 2), 3, seed=0), Chunk("long", (3, 4), 50, seed=0)])
    engine.submit([Chunk("queued", (5,), 5, seed=0)])
    assert [r.request_id for r in engine.collect()] == ["short"]
    engine.abort(["long", "queued", "unknown"])
    aborted = {r.request_id: r for r in engine.collect()}
    assert set(aborted) == {"long", "queued"}
    assert all(r.finish_reason == "abort" for r in aborted.values())
    assert aborted["queued"].tokens == () and aborted["queued"].versions == ()
    partial = aborted["long"].tokens
    assert len(partial) == 3
    engine.submit([Chunk("long", (3, 4) + partial, 47, seed=0)])
    (rest,) = engine.collect()
    assert rest.cached_tokens == 4
    whole = make_engine()
    whole.submit([Chunk("long", (3, 4), 50, seed=0)])
    assert partial + rest.tokens == whole.collect()[0].tokens


def test_context_limit_ends_a_chunk(make_engine):
    engine = make_engine(max_context=40)
    engine.submit([Chunk("r", tuple(range(30)), 100, seed=0)])
    (result,) = engine.collect()
    assert len(result.tokens) == 10 and result.finish_reason == "length"


@pytest.mark.parametrize(
    ("chunk", "cause"),
    [
        (Chunk("bad", tuple(range(40)), 1, seed=0), "'bad' has 40 tokens of context.*max_context 40"),
        (Chunk("bad", (), 1, seed=0), "no tokens"),
        (Chunk("bad", (1,), 0, seed=0), "max_new_tokens 0"),
        (Chunk("bad", (1, 96), 1, seed=0), r"vocabulary \[0, 96\)"),
        (Chunk("bad", (1,), 1, seed=0, temperature=-1.0), "temperature -1.0"),
        (Chunk("twin", (1,), 1, seed=0), "'twin' is already running"),
    ],
)
def test_refused_chunks(make_engine, chunk, cause):
    engine = make_engine(max_context=40)
    engine.submit([Chunk("twin", (1,), 1, seed=0)])
    with pytest.raises(EngineError, match=f"test-engine.*{cause}"):
        engine.submit([Chunk("good", (1,), 1, seed=0), chunk])
    assert engine.statistics().waiting == 1, "a refused submission queues nothing"


@pytest.mark.parametrize(("sequence", "cause"), [([], "no tokens"), ([1, -1], "vocabulary")])
def test_refused_scores(make_engine, sequence, cause):
    with pytest.raises(EngineError, match=f"test-engine.*sequence 1.*{cause}"):
        make_engine().score([[1, 2], sequence])


def test_unsuitable_models_are_refused(folders, tmp_path):
    with pytest.raises(EngineError, match="max_context 2000 exceeds the model's max_position_embeddings 1024"):
        EmbeddedEngine(str(folders["qwen3"]), name="e", slots=1, max_context=2000)
    with pytest.raises(EngineError, match="cannot load"):
        EmbeddedEngine(str(tmp_path / "absent"), name="e", slots=1, max_context=20)

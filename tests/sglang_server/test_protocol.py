"""The engine protocol, held by all engines: the same assertions on the same models."""

from __future__ import annotations

from itertools import count

import numpy as np
import pytest
import torch
from engine_sleep import *  # noqa: F403  sleep, wake and interrupt
from safetensors.torch import load_file

from megatron_pbsd.resharding.checksum import checksum
from megatron_pbsd.resharding.shared_memory import attach
from megatron_pbsd.rollout.engines.protocol import Chunk, ChunkResult, Engine, EngineError
from megatron_pbsd.trajectory import VersionSpan

NUMBERS = count()
PROMPT = tuple(range(3, 20))
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


# All engines of a model before the next model: servers are started once.
@pytest.fixture(params=[(kind, model) for model in ("dense", "moe") for kind in ("embedded", "sglang", "drafting")],
                ids=lambda param: "-".join(param))
def case(request, engines):
    return engines(*request.param), request.param[1]


@pytest.fixture
def engine(case) -> Engine:
    return case[0]


@pytest.fixture
def model(case, references):
    return references[case[1]]


@pytest.fixture
def tensors(case, models) -> dict[str, torch.Tensor]:
    return load_file(models[case[1]] / "model.safetensors")


@pytest.fixture
def restored(engine, tensors, publish):
    """The engine has its first weights again afterwards. Gives versions that it has not had."""
    yield count(engine.statistics().version + 1)
    engine.update_weights(publish(tensors), engine.statistics().version + 1)


def new_id() -> str:
    return f"0/group/{next(NUMBERS)}"


def chunk(tokens=PROMPT, new=12, *, request_id="", seed=1, temperature=0.0, **fields) -> Chunk:
    return Chunk(request_id or new_id(), tuple(tokens), new, seed, temperature, **fields)


def drain(engine: Engine) -> dict[str, ChunkResult]:
    results = {}
    while ended := engine.collect():
        results |= {result.request_id: result for result in ended}
    return results


def run(engine: Engine, *chunks: Chunk) -> list[ChunkResult]:
    engine.submit(chunks)
    results = drain(engine)
    return [results[chunk.request_id] for chunk in chunks]


def greedy(model, prompt, new=12) -> tuple[int, ...]:
    generated = model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), max_new_tokens=new,
        do_sample=False, eos_token_id=None, pad_token_id=0)
    return tuple(generated[0, len(prompt):].tolist())


def log_probs(model, tokens) -> np.ndarray:
    """Of each token after the first."""
    with torch.no_grad():
        values = torch.log_softmax(model(torch.tensor([tokens])).logits[0], dim=-1)
    return values[:-1].gather(1, torch.tensor(tokens[1:])[:, None]).squeeze(1).numpy()


def changed(tensors, scale=0.05, seed=9) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: t + scale * torch.randn(t.shape, generator=generator) for name, t in tensors.items()}


def test_greedy_equals_generate(engine, model):
    prompts = [PROMPT, PROMPT[:1], tuple(range(60, 5, -1)), PROMPT[:9]]
    for prompt, result in zip(prompts, run(engine, *(chunk(prompt) for prompt in prompts)), strict=True):
        assert result.tokens == greedy(model, prompt) and result.finish_reason == "length"


def test_log_probs_are_of_temperature_1_and_equal_a_full_forward(engine, model):
    chunks = [chunk(PROMPT[i:], 20, temperature=0.7) for i in range(5)]
    for asked, result in zip(chunks, run(engine, *chunks), strict=True):
        expected = log_probs(model, asked.tokens + result.tokens)[len(asked.tokens) - 1:]
        np.testing.assert_allclose(result.log_probs, expected, atol=1e-5)


def test_score_equals_a_full_forward(engine, model):
    generator = torch.Generator().manual_seed(2)
    sequences = [torch.randint(64, (n,), generator=generator).tolist() for n in (1, 2, 100, 31, 64, 5)]
    for tokens, scores in zip(sequences, engine.score(sequences), strict=True):
        assert scores.dtype == np.float32 and scores.shape == (len(tokens),) and scores[0] == 0
        np.testing.assert_allclose(scores[1:], log_probs(model, tokens), atol=1e-5)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_divided_request_continues(engine, temperature):
    whole, cut = chunk(new=30, temperature=temperature), []
    (expected,) = run(engine, whole)
    for _ in range(3):
        part = chunk((*PROMPT, *cut), 10, request_id=whole.request_id, temperature=temperature)
        (result,) = run(engine, part)
        cut += result.tokens
        assert result.finish_reason == "length"
    assert tuple(cut) == expected.tokens
    # All but the newest token has been read; an engine may keep that in whole blocks.
    assert result.cached_tokens >= len(PROMPT) + 10


def test_samples_depend_on_seed_and_request_alone(engine):
    one, other = new_id(), new_id()
    alone = run(engine, chunk(request_id=one, temperature=1.0))[0].tokens
    beside = run(engine, chunk(request_id=one, temperature=1.0), chunk(request_id=other, temperature=1.0),
                 *(chunk(PROMPT[i:], 30, temperature=1.0) for i in range(4)))
    assert beside[0].tokens == alone != beside[1].tokens
    assert run(engine, chunk(request_id=one, temperature=1.0, seed=2))[0].tokens != alone


def test_generation_ends_after_stop_tokens_and_no_others(engine, model):
    """The dense model's configuration names 23 as its end of text."""
    expected = greedy(model, PROMPT, 30)
    stop = expected[14]
    first = expected.index(stop)
    asked, unasked = run(engine, chunk(new=30, stop_token_ids=(stop, 63)), chunk(new=30))
    assert asked.tokens == expected[: first + 1] and asked.finish_reason == "stop"
    assert unasked.tokens == expected and unasked.finish_reason == "length"
    assert len(unasked.log_probs) == 30 and unasked.versions[-1].end == 30


def test_more_chunks_than_slots(engine, model):
    chunks = [chunk(PROMPT[i % 9:], 5 + i % 7) for i in range(20)]
    for asked, result in zip(chunks, run(engine, *chunks), strict=True):
        assert result.tokens == greedy(model, asked.tokens, asked.max_new_tokens)


def test_context_is_the_limit(engine):
    (result,) = run(engine, chunk(range(50), 1000))
    assert len(result.tokens) == 120 - 50 and result.finish_reason == "length"


def test_abort_gives_back_what_there_is(engine, model):
    chunks = [chunk(PROMPT[i % 5:], 100) for i in range(12)]
    engine.submit(chunks)
    engine.abort([c.request_id for c in chunks[:6]] + ["unknown"])
    engine.abort([c.request_id for c in chunks[6:]])
    results = drain(engine)
    assert len(results) == 12
    for asked in chunks:
        result = results[asked.request_id]
        expected = greedy(model, asked.tokens, 100)
        assert result.finish_reason in ("abort", "length") and len(result.log_probs) == len(result.tokens)
        assert result.tokens == expected[: len(result.tokens)]
    assert any(result.finish_reason == "abort" for result in results.values())


def test_refusals_leave_the_engine_well(engine, model):
    running = chunk(new=40)
    engine.submit([running])
    cases = {
        "is already running": running,
        "outside of the vocabulary": chunk([3, 64]),
        "has no tokens": chunk([]),
        "no room below max_context 120": chunk(tuple(range(60)) * 2),
        "has max_new_tokens 0": chunk(new=0),
        "has temperature -1": chunk(temperature=-1),
        "has routed_from 18, expected 0 … 17": chunk(routed_from=18),
    }
    for message, bad in cases.items():
        with pytest.raises(EngineError, match=f"engine-0.*{message}"):
            engine.submit([bad])
    with pytest.raises(EngineError, match="sequence 1 to score has token ids outside"):
        engine.score([[1], [64]])
    assert drain(engine)[running.request_id].tokens == greedy(model, PROMPT, 40)


def test_checksums_and_copies_are_those_of_the_checkpoint(engine, tensors, publish):
    assert engine.checksums() == {name: checksum(tensor) for name, tensor in tensors.items()}
    manifest = publish({name: torch.zeros_like(tensor) for name, tensor in tensors.items()})
    engine.write_weights(manifest)
    assert all(torch.equal(attach(manifest)[name], tensor) for name, tensor in tensors.items())


def test_new_weights_change_tokens_as_in_transformers(engine, tensors, publish, restored, with_weights):
    before, version, weights = run(engine, chunk())[0].tokens, next(restored), changed(tensors)
    engine.update_weights(publish(weights), version)
    assert engine.checksums() == {name: checksum(tensor) for name, tensor in weights.items()}
    (result,) = run(engine, chunk(new=20))
    updated = with_weights(weights)
    assert result.versions == (VersionSpan(version, 0, 20),) and result.cached_tokens == 0
    assert result.tokens == greedy(updated, PROMPT, 20) and result.tokens[:12] != before
    np.testing.assert_allclose(
        result.log_probs, log_probs(updated, PROMPT + result.tokens)[len(PROMPT) - 1:], atol=1e-5)
    assert engine.statistics().version == version


def test_running_chunks_continue_under_new_weights(engine, model, tensors, publish, restored, with_weights):
    (short, long), version, old = (chunk(PROMPT[:4], 3), chunk(new=100)), next(restored), engine.statistics().version
    engine.submit([short, long])
    (first,) = engine.collect()
    weights = changed(tensors)
    engine.update_weights(publish(weights), version)
    (result,) = drain(engine).values()
    assert first.request_id == short.request_id and result.request_id == long.request_id
    before, after = result.versions
    assert (before.version, after.version, before.end, after.end) == (old, version, after.start, 100)
    context, updated = PROMPT + result.tokens, with_weights(weights)
    expected = np.concatenate([log_probs(model, context)[len(PROMPT) - 1:][: before.end],
                               log_probs(updated, context)[len(PROMPT) - 1:][before.end:]])
    np.testing.assert_allclose(result.log_probs, expected, atol=1e-5)


def test_wrong_weights_are_an_error_and_change_nothing(engine, tensors, publish):
    version, before = engine.statistics().version, engine.checksums()
    weights = changed(tensors)
    renamed = {name.replace("q_proj.", "q_projection."): t for name, t in weights.items()}
    cases = {
        f"{Q_PROJ}' is missing": {name: t for name, t in weights.items() if name != Q_PROJ},
        "bias' is not a parameter": weights | {"model.norm.bias": torch.zeros(3)},
        rf"{Q_PROJ}' is float32\[64, 31\], expected float32\[64, 32\]": weights | {Q_PROJ: torch.zeros(64, 31)},
        rf"{Q_PROJ}' is bfloat16\[64, 32\], expected float32": weights | {Q_PROJ: weights[Q_PROJ].bfloat16()},
        f"{Q_PROJ}' is missing.*q_projection": renamed,
    }
    for message, published in cases.items():
        with pytest.raises(EngineError, match=f"engine-0.*version 77.*{message}"):
            engine.update_weights(publish(published), 77)
    assert engine.checksums() == before and engine.statistics().version == version
    assert run(engine, chunk())[0].versions == (VersionSpan(version, 0, 12),)


def test_statistics(engine):
    before = engine.statistics()
    request = new_id()
    (first,) = run(engine, chunk(range(40, 60), 12, request_id=request))
    (second,) = run(engine, chunk((*range(40, 60), *first.tokens), 4, request_id=request))
    engine.submit([chunk(new=30)])
    during = engine.statistics()
    drain(engine)
    after = engine.statistics()
    assert (during.running + during.waiting, after.running, after.waiting) == (1, 0, 0)
    assert after.generated_tokens - before.generated_tokens == 12 + 4 + 30
    assert after.cached_tokens > before.cached_tokens and after.prefilled_tokens > before.prefilled_tokens
    assert second.cached_tokens >= 31
    passes, kept = after.decode_steps - before.decode_steps, after.accepted_tokens - before.accepted_tokens
    assert passes + kept >= 40 and after.busy_seconds > before.busy_seconds
    assert after.kv_tokens >= 8 * 120 and after.cached_requests > 0
    engine.release([request])


def test_routed_experts_are_those_of_transformers(case, model):
    engine, kind = case
    (first,) = run(engine, chunk(request_id="routed", routed_from=0))
    if kind == "dense":
        assert first.routed_experts is None
        return
    context = PROMPT + first.tokens
    known = len(first.routed_experts)
    (second,) = run(engine, chunk(context, 6, request_id="routed", routed_from=known))
    with torch.no_grad():
        logits = model(torch.tensor([context + second.tokens]), output_router_logits=True).router_logits
    expected = np.sort(torch.stack([layer.topk(2).indices for layer in logits], 1).numpy(), -1)
    assert first.routed_from == 0 and known == len(context) - 1 and first.routed_experts.dtype == np.int16
    np.testing.assert_array_equal(np.sort(first.routed_experts, -1), expected[:known])
    start = second.routed_from
    assert start <= known
    np.testing.assert_array_equal(np.sort(second.routed_experts, -1), expected[start:-1])

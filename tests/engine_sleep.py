"""Sleep, wake and interrupt of the engine protocol: the same assertions for every engine.

Whoever imports these tests has the fixtures `engine`, `model` (transformers' model of the same weights), `tensors` (of
its checkpoint) and `restored` (the engine has its first weights again afterwards; gives versions it has not had).
"""

from __future__ import annotations

import threading
from itertools import count

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from megatron_pbsd.resharding.checksum import checksum
from megatron_pbsd.rollout.engines.protocol import MEMORY_TAGS, Chunk, ChunkResult, Engine, EngineError

NUMBERS = count()
CONTEXT = tuple(range(3, 40))


def asked(tokens=CONTEXT, new=12, request_id="") -> Chunk:
    return Chunk(request_id or f"sleep/{next(NUMBERS)}", tuple(tokens), new, seed=1, temperature=0.0)


def finished(engine: Engine) -> list[ChunkResult]:
    results = []
    while ended := engine.collect():
        results += ended
    return results


def expected(model, tokens, new) -> tuple[int, ...]:
    generated = model.generate(
        torch.tensor([tokens]), attention_mask=torch.ones(1, len(tokens), dtype=torch.long), max_new_tokens=new,
        do_sample=False, eos_token_id=None, pad_token_id=0)
    return tuple(generated[0, len(tokens):].tolist())


@pytest.fixture
def with_weights(model, tmp_path):
    """A transformers model of the same kind with other weights."""
    def load(tensors):
        model.config.save_pretrained(tmp_path)
        save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
        return AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()

    return load


def test_a_context_is_read_again_after_its_kv_slept(engine, model):
    request = asked()
    engine.submit([request])
    (first,) = finished(engine)
    held = engine.checksums()
    engine.sleep(["kv_cache"])
    engine.sleep(["kv_cache"])
    for use in (lambda: engine.submit([asked()]), lambda: engine.score([CONTEXT])):
        with pytest.raises(EngineError, match="engine-0.*needs kv_cache, whose memory sleeps"):
            use()
    assert engine.checksums() == held
    engine.wake(["kv_cache"])
    engine.wake(["kv_cache"])
    engine.submit([asked(CONTEXT + first.tokens, 20, request.request_id)])
    (second,) = finished(engine)
    assert second.cached_tokens == 0 and first.tokens + second.tokens == expected(model, CONTEXT, 32)


def test_weights_that_slept_are_none_until_they_are_published(engine, tensors, publish, restored, with_weights):
    generator = torch.Generator().manual_seed(8)
    weights = {name: t + 0.05 * torch.randn(t.shape, generator=generator) for name, t in tensors.items()}
    manifest = publish(weights)
    engine.submit([request := asked()])
    (before,) = finished(engine)
    engine.sleep(MEMORY_TAGS)
    uses = {"generation": lambda: engine.submit([asked()]), "scoring": lambda: engine.score([CONTEXT]),
            "a checksum": engine.checksums, "reading weights": lambda: engine.write_weights(manifest)}
    for use, attempt in uses.items():
        with pytest.raises(EngineError, match=f"engine-0.*{use} needs (kv_cache and )?weights, whose memory sleeps"):
            attempt()
    version = next(restored)
    with pytest.raises(EngineError, match=f"version {version} needs the memory of weights, which sleeps"):
        engine.update_weights(manifest, version)
    engine.wake(["weights"])
    for use in ("a checksum", "reading weights"):
        with pytest.raises(EngineError, match=f"no weights yet: {use} needs a publication"):
            uses[use]()
    engine.update_weights(manifest, version)
    assert engine.checksums() == {name: checksum(tensor) for name, tensor in weights.items()}
    with pytest.raises(EngineError, match="generation needs kv_cache"):
        uses["generation"]()
    engine.wake(MEMORY_TAGS)
    engine.submit([asked(CONTEXT, 12, request.request_id)])
    (after,) = finished(engine)
    updated = with_weights(weights)
    assert after.cached_tokens == 0 and after.versions[0].version == version
    assert after.tokens == expected(updated, CONTEXT, 12) and after.tokens != before.tokens
    with torch.no_grad():
        log_probs = torch.log_softmax(updated(torch.tensor([CONTEXT])).logits[0, :-1], dim=-1)
    chosen = log_probs.gather(1, torch.tensor(CONTEXT[1:])[:, None]).squeeze(1).numpy()
    np.testing.assert_allclose(engine.score([CONTEXT])[0][1:], chosen, atol=1e-5)


def test_nothing_sleeps_under_chunks_in_flight(engine, model):
    chunks = [asked(CONTEXT[i:], 40) for i in range(10)]
    engine.submit(chunks)
    for tag in MEMORY_TAGS:
        with pytest.raises(EngineError, match="engine-0.*cannot sleep: 10 chunks are in flight"):
            engine.sleep([tag])
    results = {result.request_id: result for result in finished(engine)}
    for chunk in chunks:
        assert results[chunk.request_id].tokens == expected(model, chunk.tokens, 40)
    engine.submit(chunks := [asked(new=60) for _ in range(10)])
    engine.abort([chunk.request_id for chunk in chunks])
    finished(engine)
    engine.sleep(["kv_cache"])
    engine.wake(["kv_cache"])


def test_tags_that_do_not_exist_are_refused(engine):
    for call in (engine.sleep, engine.wake):
        with pytest.raises(EngineError, match="engine-0.*no memory 'kv-cache'; there are kv_cache, weights"):
            call(["kv-cache"])


def test_interrupt_lets_collect_return_until_abort(engine, model):
    engine.submit([chunk := asked(new=60)])
    engine.interrupt()
    assert engine.collect() == engine.collect() == []
    engine.abort([])
    timer = threading.Timer(0.05, engine.interrupt)
    timer.start()
    results = engine.collect()
    timer.join()
    assert len(results) <= 1
    engine.abort([chunk.request_id])
    results += finished(engine)
    (result,) = results
    assert result.tokens == expected(model, CONTEXT, 60)[: len(result.tokens)]
    engine.submit([asked(new=5)])
    assert len(finished(engine)) == 1

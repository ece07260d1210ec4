"""Generation speed of the embedded engine: a small Qwen3 with random weights, one batch of equal chunks."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from megatron_pbsd.errors import UsageError
from megatron_pbsd.rollout.engines.embedded.engine import EmbeddedEngine
from megatron_pbsd.rollout.engines.protocol import Chunk

SEQUENCES, PROMPT, GENERATED = 64, 64, 64


def run(overrides: Sequence[str] = ()) -> dict[str, float]:
    if overrides:
        raise UsageError(f"the bench 'engine' reads no configuration, so {overrides[0]} means nothing to it")
    torch.manual_seed(0)
    config = Qwen3Config(vocab_size=2048, hidden_size=128, intermediate_size=384, num_hidden_layers=4,
                         num_attention_heads=4, num_key_value_heads=2, head_dim=32, tie_word_embeddings=True)
    model = Qwen3ForCausalLM(config)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        engine = EmbeddedEngine(folder, name="bench", slots=SEQUENCES, max_context=PROMPT + GENERATED)
    prompts = torch.randint(config.vocab_size, (SEQUENCES, PROMPT)).tolist()
    engine.submit([Chunk(str(i), tuple(p), GENERATED, seed=0) for i, p in enumerate(prompts)])
    started, finished = time.perf_counter(), 0
    while finished < SEQUENCES:
        finished += len(engine.collect())
    seconds, counters = time.perf_counter() - started, engine.statistics()
    return {"parameters": model.num_parameters(), "sequences": SEQUENCES,
            "generated_tokens_per_s": counters.generated_tokens / seconds,
            "prefilled_tokens": counters.prefilled_tokens, "seconds": seconds}

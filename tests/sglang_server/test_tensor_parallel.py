"""A server whose two processes have half of each tensor."""

from __future__ import annotations

import torch
from engine_sleep import CONTEXT, asked, expected, finished
from safetensors.torch import load_file

from megatron_pbsd.resharding.checksum import checksum
from megatron_pbsd.rollout.engines.protocol import MEMORY_TAGS


def test_weights_in_and_out_bit_for_bit_and_what_they_generate(engines, models, references, publish):
    engine = engines("tp2", "dense")
    tensors = load_file(models["dense"] / "model.safetensors")
    generator = torch.Generator().manual_seed(4)
    others = {name: t + 0.05 * torch.randn(t.shape, generator=generator) for name, t in tensors.items()}
    for version, weights in ((1, others), (2, tensors)):
        engine.sleep(MEMORY_TAGS)
        engine.wake(["weights"])
        engine.update_weights(publish(weights), version)
        engine.wake(["kv_cache"])
        assert engine.checksums() == {name: checksum(tensor) for name, tensor in weights.items()}
    engine.submit([asked()])
    (result,) = finished(engine)
    assert result.tokens == expected(references["dense"], CONTEXT, 12) and result.versions[0].version == 2

"""Exported folders are what transformers reads."""

from __future__ import annotations

import torch
from safetensors.torch import load_file

from megatron_pbsd.checkpointing.hf_export import export_hf


def test_export_is_read_by_transformers(tmp_path):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, head_dim=8,
                         num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True)
    Qwen3ForCausalLM(config).save_pretrained(tmp_path / "source")
    (tmp_path / "source" / "tokenizer.json").write_text("{}")
    trained = {name: tensor + 1 for name, tensor in load_file(tmp_path / "source" / "model.safetensors").items()}
    for _ in range(2):  # the second replaces the first
        export_hf(trained, tmp_path / "source", tmp_path / "exported")
    assert (tmp_path / "exported" / "tokenizer.json").read_text() == "{}"
    read = dict(Qwen3ForCausalLM.from_pretrained(tmp_path / "exported").named_parameters())
    assert read.keys() == trained.keys()
    for name, tensor in trained.items():
        assert torch.equal(read[name], tensor)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["exported", "source"]

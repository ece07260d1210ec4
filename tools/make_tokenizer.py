"""Make the folder that base-policy training starts from: tokenizer.json and config.json, no weights.

    python tools/make_tokenizer.py FOLDER

The tokenizer is trained on the environment's passages and training questions; config.json describes a Qwen3
architecture of about 1 M parameters.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from megatron_pbsd.environments.search_qa.corpus import load_corpus
from megatron_pbsd.environments.search_qa.relations import RELATIONS
from megatron_pbsd.environments.search_qa.tokenizer import PAD, train

VOCABULARY = 2048
ARCHITECTURE = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": True,
    "initializer_range": 0.02,
    "use_cache": True,
    "dtype": "float32",
}


def main(folder: Path) -> None:
    corpus = load_corpus()
    texts = [text for passage in corpus.passages for text in (passage.title, passage.text)]
    # The protocol's own words are few among the passages but in every question and query.
    texts += [text for relation in RELATIONS.values()
              for text in (relation.words, relation.phrase.format(""), (relation.inverse or "").format(""))] * 200
    tokenizer = train(texts, VOCABULARY)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    architecture = {**ARCHITECTURE, "pad_token_id": tokenizer.token_to_id(PAD)}
    (folder / "config.json").write_text(json.dumps(architecture, indent=2) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

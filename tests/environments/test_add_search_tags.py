from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_pbsd.environments.search_qa.tokenizer import SPECIAL_TOKENS, SearchTokenizer

TOOL = Path(__file__).parents[2] / "tools" / "add_search_tags.py"
ROWS = 320


@pytest.fixture
def folder(tmp_path) -> Path:
    """A byte-level tokenizer with some tags of its own, one of them the task's, as Qwen3 has; ids up to 258."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator([], trainers.BpeTrainer(
        vocab_size=256, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": ROWS}))
    return tmp_path


def add_tags(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(TOOL), str(folder)], capture_output=True, text=True)


def test_the_task_can_read_with_it(folder):
    before = Tokenizer.from_file(str(folder / "tokenizer.json"))
    with pytest.raises(ValueError, match="lacks the tag"):
        SearchTokenizer(folder)
    assert "12 tags added" in add_tags(folder).stdout
    tokenizer = SearchTokenizer(folder)
    assert sorted(tokenizer.ids) == sorted(SPECIAL_TOKENS) and len(set(tokenizer.ids.values())) == len(SPECIAL_TOKENS)
    assert tokenizer.ids["<think>"] == before.token_to_id("<think>") and max(tokenizer.ids.values()) < ROWS
    text = "who wrote <search> and <think> ?"
    assert tokenizer.decode(tokenizer.encode(text)) == "who wrote < search > and < think > ?"
    assert not set(tokenizer.encode(text)) & set(tokenizer.ids.values()), "text cannot be a tag"
    assert list(tokenizer.encode("plain words")) == before.encode("plain words").ids
    assert "0 tags added" in add_tags(folder).stdout


def test_the_embedding_has_no_rows_for_them(folder):
    (folder / "config.json").write_text(json.dumps({"vocab_size": 265}))
    before = (folder / "tokenizer.json").read_bytes()
    done = add_tags(folder)
    assert done.returncode == 1 and "ids up to 270" in done.stderr and "vocab_size = 265 rows" in done.stderr
    assert (folder / "tokenizer.json").read_bytes() == before and not list(folder.glob("*.new"))

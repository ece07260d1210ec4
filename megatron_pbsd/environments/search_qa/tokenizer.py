"""The task's own tokenizer: a byte-level BPE of a few thousand pieces, with the turn protocol's tags as single tokens.

A 1 M-parameter policy must *copy* names from passages into queries and answers. So a word has one tokenisation
wherever it stands: text is canonical (ASCII, punctuation set off by spaces, digits apart), and every word carries
its leading space.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

PAD, USER, HINT, END_HINT, ASSISTANT = "<pad>", "<user>", "<hint>", "</hint>", "<assistant>"
THINK, END_THINK, SEARCH, END_SEARCH = "<think>", "</think>", "<search>", "</search>"
RESULT, END_RESULT, ANSWER, END_ANSWER = "<result>", "</result>", "<answer>", "</answer>"
SPECIAL_TOKENS = (PAD, USER, HINT, END_HINT, ASSISTANT, THINK, END_THINK, SEARCH, END_SEARCH, RESULT, END_RESULT,
                  ANSWER, END_ANSWER)


def canonical(text: str) -> str:
    """ASCII text with single spaces and each punctuation mark a word of its own."""
    ascii_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return " ".join(re.findall(r"\w+|[^\w\s]", ascii_text))


def train(texts: Iterable[str], vocabulary_size: int) -> Tokenizer:
    """Train on canonical texts. The first ids are SPECIAL_TOKENS in order, so PAD is 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.ByteLevel(add_prefix_space=True), pre_tokenizers.Digits(individual_digits=True)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        (canonical(text) for text in texts),
        trainers.BpeTrainer(vocab_size=vocabulary_size, special_tokens=list(SPECIAL_TOKENS), show_progress=False,
                            initial_alphabet=[chr(c) for c in range(33, 127)] + ["Ġ"]))
    return tokenizer


class SearchTokenizer:
    """Encodes pieces of text; tags are added by id, so text can never forge a tag."""

    def __init__(self, model_path: str | Path):
        path = Path(model_path) / "tokenizer.json"
        if not path.exists():
            raise FileNotFoundError(f"model.path = {str(model_path)!r} holds no tokenizer.json")
        self._tokenizer = Tokenizer.from_file(str(path))
        # Text is encoded apart from the tags: what looks like a tag in it stays text.
        self._tokenizer.encode_special_tokens = True
        self.ids = {}
        for token in SPECIAL_TOKENS:
            token_id = self._tokenizer.token_to_id(token)
            if token_id is None:
                raise ValueError(f"the tokenizer of model.path = {str(model_path)!r} lacks the tag {token!r}; "
                                 "environment.name = 'search_qa' needs all of " + ", ".join(SPECIAL_TOKENS))
            self.ids[token] = token_id

    @property
    def size(self) -> int:
        return self._tokenizer.get_vocab_size()

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(canonical(text), add_special_tokens=False).ids)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text with tags, as a person would read it."""
        return self._tokenizer.decode(list(tokens), skip_special_tokens=False).strip()

"""What the search tool asks: the best passage for a query."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Protocol

import bm25s
import Stemmer

from megatron_pbsd.environments.search_qa.corpus import Passage
from megatron_pbsd.environments.search_qa.text import fold


class Retriever(Protocol):
    def search(self, query: str) -> Passage | None:
        """The best passage; None for an empty query or where nothing matches."""


class BM25Retriever:
    """BM25 (Robertson and Zaragoza 2009) over stemmed words; words of the title count `title_weight` times more.

    No word is dropped as a stop word: 'In', 'As' and 'At' are symbols of elements. Ties go to the lowest passage id.
    """

    def __init__(self, passages: Sequence[Passage], title_weight: int = 3) -> None:
        self._passages = tuple(passages)
        self._stemmer = Stemmer.Stemmer("english")
        documents = [self._tokens(f"{f'{p.title} ' * title_weight}{p.text}") for p in self._passages]
        self._index = bm25s.BM25(k1=1.2, b=0.75)
        self._index.index(documents, show_progress=False)

    def search(self, query: str) -> Passage | None:
        known = [token for token in self._tokens(query) if token in self._index.vocab_dict]
        if not known:
            return None
        return self._passages[int(self._index.get_scores(known).argmax())]

    def _tokens(self, text: str) -> list[str]:
        return self._stemmer.stemWords(re.findall(r"\w+", fold(text).lower()))


class EmptyRetriever:
    """Finds nothing: the control that shows what can be answered without the tool."""

    def search(self, query: str) -> Passage | None:
        return None

from types import SimpleNamespace

import pytest

from megatron_pbsd.environments.search_qa.corpus import load_corpus
from megatron_pbsd.environments.search_qa.facts import extract_facts
from megatron_pbsd.environments.search_qa.questions import generate_questions
from megatron_pbsd.environments.search_qa.retriever import BM25Retriever


@pytest.fixture(scope="session")
def search_data() -> SimpleNamespace:
    corpus = load_corpus()
    facts = extract_facts(corpus)
    retriever = BM25Retriever(corpus.passages)
    limits = {"train": 2000, "heldout": 300}
    questions = generate_questions(corpus, facts, retriever, limits)
    return SimpleNamespace(corpus=corpus, facts=facts, retriever=retriever, questions=questions, limits=limits)

from collections import defaultdict

import pytest

from megatron_pbsd.environments.search_qa.corpus import Passage
from megatron_pbsd.environments.search_qa.relations import RELATIONS
from megatron_pbsd.environments.search_qa.retriever import BM25Retriever, EmptyRetriever


@pytest.mark.parametrize("name", RELATIONS)
def test_templated_queries_find_the_passage_of_the_fact(search_data, name):
    facts = [fact for fact in search_data.facts if fact.relation == name]
    relation = RELATIONS[name]
    found = [search_data.retriever.search(f"{fact.subject} {relation.words}") for fact in facts]
    recall = sum(p is not None and p.passage_id == fact.passage_id for p, fact in zip(found, facts, strict=True))
    assert recall >= 0.97 * len(facts)


@pytest.mark.parametrize("name", [name for name, relation in RELATIONS.items() if relation.inverse])
def test_inverse_queries_find_the_subject(search_data, name):
    subjects = defaultdict(list)
    for fact in search_data.facts:
        if fact.relation == name:
            subjects[fact.object.lower()].append(fact)
    unique = [facts[0] for facts in subjects.values() if len(facts) == 1]
    found = [search_data.retriever.search(f"{RELATIONS[name].words} {fact.object}") for fact in unique]
    recall = sum(p is not None and p.passage_id == fact.passage_id for p, fact in zip(found, unique, strict=True))
    assert recall >= 0.95 * len(unique)


def test_unanswerable_queries_find_nothing(search_data):
    assert search_data.retriever.search("") is None
    assert search_data.retriever.search(" ?! ") is None
    assert search_data.retriever.search("qqqqzzzz") is None
    assert EmptyRetriever().search("France capital") is None


def test_spelling_case_and_accents_do_not_matter(search_data):
    expected = search_data.retriever.search("Paraguay capital")
    assert expected is not None and expected.text == "Asuncion"
    assert search_data.retriever.search("  PARAGUAY, capitals! ") == expected
    assert search_data.retriever.search("capital Asunción") == expected


def test_ties_go_to_the_first_passage():
    passages = [Passage(i, "Same title", "same text") for i in range(4)]
    passages.insert(0, Passage(9, "Other", "words"))
    found = BM25Retriever(passages).search("same")
    assert found == passages[1]


def test_nothing_is_printed(search_data, capfd):
    BM25Retriever(search_data.corpus.passages[:100]).search("capital")
    assert capfd.readouterr() == ("", "")

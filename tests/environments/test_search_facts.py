import re
from collections import Counter

import pytest
from mendeleev.fetch import fetch_table

from megatron_pbsd.environments.search_qa.facts import MAX_ANSWER_WORDS
from megatron_pbsd.environments.search_qa.relations import RELATIONS

# Common knowledge, written down without looking at the data.
KNOWN = [
    ("France", "capital", "Paris"),
    ("Japan", "currency", "yen"),
    ("Mexico", "currency", "Mexican pesos"),
    ("Tanzania", "highest_point", "Kilimanjaro"),
    ("Jordan", "lowest_point", "Dead Sea"),
    ("Ghana", "independence_year", "1957"),
    ("Senegal", "former_ruler", None),  # two dates are given: not plain
    ("Algeria", "former_ruler", "France"),
    ("India", "former_ruler", "United Kingdom"),
    ("Iceland", "internet_code", ".is"),
    ("France", "internet_code", None),  # one for each overseas department
    ("Canada", "export_partner", "United States"),
    ("Brazil", "official_language", "Portuguese"),
    ("Canada", "official_language", None),  # two
    ("Ireland", "demonym", "Irish"),
    ("United States", "anthem", "The Star-Spangled Banner"),
    ("Canada", "anthem", None),  # the source has the royal anthem only
    ("Thailand", "former_name", "Siam"),
    ("Germany", "local_name", "Deutschland"),
    ("Nigeria", "largest_city", "Lagos"),
    ("Turkey", "largest_city", "Istanbul"),
    ("Belize", "largest_city", None),  # the source lists the capital only
    ("Lesotho", "only_neighbor", "South Africa"),
    ("Bolivia", "capital", None),  # two
    ("Gold", "symbol", "Au"),
    ("Dysprosium", "discovery_country", "France"),
    ("Oxygen", "discovery_country", None),  # England and Sweden
    ("Phosphorus", "discoverer", "Hennig Brand"),
    ("Radium", "discoverer", None),  # two persons
]


@pytest.fixture(scope="module")
def by_key(search_data):
    return {(fact.subject, fact.relation): fact for fact in search_data.facts}


@pytest.mark.parametrize(("subject", "relation", "expected"), KNOWN)
def test_known_facts(by_key, subject, relation, expected):
    fact = by_key.get((subject, relation))
    assert (fact.object if fact else None) == expected


def test_at_most_one_fact_per_subject_and_relation(search_data, by_key):
    assert len(by_key) == len(search_data.facts) > 3500


def test_every_relation_has_facts(search_data):
    counts = Counter(fact.relation for fact in search_data.facts)
    assert counts.keys() == RELATIONS.keys()
    assert min(counts.values()) >= 15


def test_objects_are_short_and_stand_in_their_passage(search_data):
    for fact in search_data.facts:
        passage = search_data.corpus.passages[fact.passage_id]
        assert passage.title == f"{fact.subject}: {RELATIONS[fact.relation].label}"
        assert fact.object.lower() in passage.text.lower()
        assert fact.object.isascii() and 1 <= len(fact.object.split()) <= MAX_ANSWER_WORDS
        assert not re.search(r"[<>;%\[\]]|\d{1,3},\d{3}|\bnote\b", fact.object), fact
        assert fact.object not in fact.aliases and all(fact.aliases)


def test_objects_of_links_are_subjects(search_data):
    subjects = {fact.subject for fact in search_data.facts}
    linked = [fact for fact in search_data.facts if RELATIONS[fact.relation].leads_to]
    assert len(linked) > 500
    assert all(fact.object in subjects for fact in linked)


def test_elements_agree_with_mendeleev(by_key):
    table = fetch_table("elements").set_index("name")
    for name, row in table.iterrows():
        assert by_key[name, "symbol"].object == row["symbol"]
        assert by_key[name, "atomic_number"].object == str(row["atomic_number"])
        if (name, "discovery_year") in by_key:
            assert by_key[name, "discovery_year"].object == str(int(row["discovery_year"]))

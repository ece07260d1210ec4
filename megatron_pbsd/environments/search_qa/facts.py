"""Facts read off the passages. A fact that is not plain is left out: wrong facts would punish right answers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from megatron_pbsd.environments.search_qa.corpus import BRITISH_PLACES, Corpus, Passage
from megatron_pbsd.environments.search_qa.elements import Element
from megatron_pbsd.environments.search_qa.relations import RELATIONS
from megatron_pbsd.environments.search_qa.text import without_parentheses

MAX_ANSWER_WORDS = 4
# Stated by the factbook, but out of date, in name only or taken over from the mother country.
_DOUBTFUL = {
    ("Zimbabwe", "currency"),
    ("Montserrat", "capital"),
    ("Ecuador", "former_name"),
    ("Sint Maarten", "anthem"),
}


@dataclass(frozen=True)
class Fact:
    """`relation` maps `subject` to `object`, which stands verbatim in the passage; `aliases` are equally right."""

    subject: str
    relation: str
    object: str
    aliases: tuple[str, ...]
    passage_id: int


def extract_facts(corpus: Corpus) -> tuple[Fact, ...]:
    """All facts of all relations, ordered by subject; every subject has at most one fact per relation."""
    facts = [*_country_facts(corpus), *_element_facts(corpus)]
    return tuple(fact for fact in facts if _is_short_and_stated(fact, corpus.passages[fact.passage_id]))


def _is_short_and_stated(fact: Fact, passage: Passage) -> bool:
    stated = re.search(rf"(?<!\w){re.escape(fact.object)}(?!\w)", passage.text, re.IGNORECASE)
    return bool(stated) and len(fact.object.split()) <= MAX_ANSWER_WORDS


def _country_facts(corpus: Corpus) -> Iterator[Fact]:
    aliases = {country.name: country.aliases for country in corpus.countries}
    for country in corpus.countries:
        for name, parse in _PARSERS.items():
            relation = RELATIONS[name]
            passage = corpus.find(country.name, relation.label)
            if passage is None or (country.name, name) in _DOUBTFUL:
                continue
            text = corpus.sources[passage.passage_id]
            value = parse(text)
            if value and relation.leads_to == "country":
                value = corpus.names.resolve(value)
            if value:
                other = aliases[value] if relation.leads_to else _ALIASES.get(name, _no_aliases)(value, text)
                yield Fact(country.name, name, value, other, passage.passage_id)


def _element_facts(corpus: Corpus) -> Iterator[Fact]:
    aliases = {country.name: country.aliases for country in corpus.countries}
    for element in corpus.elements:
        for name, value in _element_values(element, corpus):
            passage = corpus.find(element.name, RELATIONS[name].label)
            if passage and value:
                other = (*aliases[value], element.location) if RELATIONS[name].leads_to else ()
                other = tuple(alias for alias in dict.fromkeys(other) if alias != value)
                yield Fact(element.name, name, value, other, passage.passage_id)


def _element_values(element: Element, corpus: Corpus) -> Iterator[tuple[str, str | None]]:
    yield "symbol", element.symbol
    yield "atomic_number", str(element.atomic_number)
    yield "discovery_year", element.year and str(element.year)
    in_kingdom = element.location in BRITISH_PLACES
    yield "discovery_country", "United Kingdom" if in_kingdom else corpus.names.resolve(element.location or "")
    yield "discoverer", _person(element.discoverers or "")


def _person(text: str) -> str | None:
    """One person's name. Lists, institutions and 'known to the ancients' are not."""
    if re.search(r"[,;/()]|\band\b|et al|ancients|Institute|Laboratory|Argonne|RIKEN", text):
        return None
    return re.sub(r"^(Sir|Baron) ", "", text) or None


def _match(pattern: str) -> Callable[[str], str | None]:
    """Parser that gives the pattern's first group when the pattern matches the whole text."""
    compiled = re.compile(pattern)

    def parse(text: str) -> str | None:
        match = compiled.fullmatch(text)
        return match[1] if match else None

    return parse


def _elevation(text: str) -> str | None:
    """'Emi Koussi 3,445 m' -> 'Emi Koussi'; unnamed and approximate places give None."""
    match = re.match(r"([A-Z][^\d;,/]+?),? -?\d[\d,.]*(?: m)?(?:;|$)", without_parentheses(text))
    if match is None or re.search(r"\b(unnamed|near|on|of the|at|junction|and|location|range|Oceans?)\b", match[1]):
        return None
    return match[1]


def _partner(text: str) -> str | None:
    """First of 'Italy 29%, France 14%, ...', unless the second has the same share."""
    shares = re.findall(r"([A-Z][^%]*?) (\d+)%", text)
    if not shares or (len(shares) > 1 and shares[0][1] == shares[1][1]):
        return None
    return shares[0][0]


def _first_listed(text: str) -> str | None:
    """First commodity of 'natural gas, crude petroleum, ... (2023)'; only dated lists are in order of value."""
    match = re.match(r"([a-z][a-z -]+)(?:,.*)? \(\d{4}\)", text)
    return match[1] if match and not re.search(r" (and|of|for) ", match[1]) else None


def _official_language(text: str) -> str | None:
    """The language marked '(official)', if exactly one is."""
    if text.count("official") != 1 or "state language" in text:
        return None
    match = re.search(r"(?:^|[,;] )([A-Z][A-Za-z]+(?: Creole)?)(?: only)?(?: [\d.]+%)? \(official(?:[,;) ])", text)
    return match[1] if match else None


def _largest_city(text: str) -> str | None:
    """The largest of '2.902 million Algiers (capital), 936,000 Oran (2022)'.

    The factbook lists the capital and what has over about 700,000 inhabitants: a smaller one may not be the largest.
    """
    cities = re.findall(r"([\d.,]*\d)( million)? ([A-Z][^,(\d]*[^,(\d ])", text)
    if not cities:
        return None
    sizes = [float(size.replace(",", "")) * (1e6 if million else 1) for size, million, _ in cities]
    if not 7e5 <= max(sizes) <= 5e7:
        return None
    name = cities[sizes.index(max(sizes))][2]
    return name if re.fullmatch(r"[A-Za-z' -]+", name) else None


def _title(text: str) -> str | None:
    """The anthem's quoted name, when there is one anthem."""
    match = re.fullmatch(r'"([^"(),;]+?),?"\s*(?:\([^()]*\))?', text)
    return match[1].strip() if match else None


def _symbol(text: str) -> str | None:
    text = without_parentheses(text)
    return text if re.fullmatch(r"(?!a |the )[A-Za-z' -]+", text) and " and " not in text else None


_NAME = r"([A-Z][A-Za-z.' -]+)"
_PARSERS: dict[str, Callable[[str], str | None]] = {
    "capital": _match(rf"(?!.* in ){_NAME}(?: \([^()]*\))?"),
    "currency": _match(r"((?!Communaute|Cooperation|Comptoirs)[A-Za-z' -]+?) \([A-Z]{2,3}\)"),
    "highest_point": _elevation,
    "lowest_point": _elevation,
    "independence_year": _match(r"(?!.*free association)\d{1,2} [A-Z][a-z]+ (\d{4})(?: \([^();]*\))?"),
    "former_ruler": _match(r"\d{1,2} [A-Z][a-z]+ \d{4} \(from ([^();]*)\)"),
    "internet_code": _match(r"(\.[a-z]{2})"),
    "export_partner": _partner,
    "import_partner": _partner,
    "main_export": _first_listed,
    "main_import": _first_listed,
    "farm_product": _first_listed,
    "official_language": _official_language,
    "demonym": _match(r"([A-Z][A-Za-z-]+(?: [A-Z][A-Za-z-]+)?)"),
    "anthem": _title,
    "former_name": _match(_NAME),
    "local_name": _match(rf"(?!.* or ){_NAME}"),
    "national_symbol": _symbol,
    "aircraft_prefix": _match(r"([A-Z0-9]{1,3}(?:-[A-Z0-9]{1,2})?)"),
    "largest_city": _largest_city,
    "only_neighbor": _match(r"([A-Z][A-Za-z' -]+) [\d.,]+ km"),
}


def _no_aliases(value: str, text: str) -> tuple[str, ...]:
    return ()


def _singular(value: str, text: str) -> tuple[str, ...]:
    """The factbook gives currencies in the plural."""
    regular = value.endswith("s") and not value.endswith(("colones", "quetzales", "meticais"))
    return (value[:-1],) if regular else ()


def _other_spellings(value: str, text: str) -> tuple[str, ...]:
    """'Tirana (Tirane)' -> 'Tirane'; remarks such as '(on Viti Levu)' are not names."""
    match = re.search(r"\(([A-Z][^()]*)\)", text)
    return tuple(re.split(r"[,/] ?", match[1])) if match and " is " not in match[1] else ()


def _translation(value: str, text: str) -> tuple[str, ...]:
    match = re.search(r"\(([^()]+)\)", text)
    return (match[1].strip('"'),) if match else ()


_ALIASES: dict[str, Callable[[str, str], tuple[str, ...]]] = {
    "capital": _other_spellings,
    "currency": _singular,
    "anthem": _translation,
}

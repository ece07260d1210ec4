"""Chemical elements from mendeleev's data base, read directly: importing mendeleev takes seconds."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from megatron_pbsd.environments.search_qa.text import plain

_COLUMNS = (
    "name, symbol, atomic_number, discovery_year, discovery_location, discoverers, "
    "name_origin, sources, uses, description"
)
# Rows of the discovery table that contradict the literature (neodymium: 1885) or are disputed.
_DOUBTFUL_DISCOVERY = {"Neodymium", "Platinum", "Nobelium", "Livermorium"}


@dataclass(frozen=True)
class Element:
    """`location` and `discoverers` are as in the source and may name several; None where unknown."""

    name: str
    symbol: str
    atomic_number: int
    year: int | None
    location: str | None
    discoverers: str | None
    texts: dict[str, str]


def load_elements() -> tuple[Element, ...]:
    """All elements by atomic number."""
    package = find_spec("mendeleev")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("the search_qa environment needs the package 'mendeleev': pip install mendeleev")
    database = Path(package.origin).parent / "elements.db"
    with closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True)) as connection:
        rows = connection.execute(f"select {_COLUMNS} from elements order by atomic_number").fetchall()
    return tuple(_element(*row) for row in rows)


def _element(name, symbol, number, year, location, discoverers, origin, sources, uses, description) -> Element:
    texts = {"Name origin": origin, "Sources": sources, "Uses": uses, "Description": description}
    texts = {label: plain(text) for label, text in texts.items() if text}
    if name in _DOUBTFUL_DISCOVERY:
        year = location = discoverers = None
    return Element(
        name, symbol, number, year, location and plain(location), discoverers and plain(discoverers), texts
    )

"""The relations that questions are made of, and how they are put into words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

EntityKind = Literal["country", "element"]


@dataclass(frozen=True)
class Relation:
    """A function from entities to short answers, stated by passages titled '<subject>: <label>'.

    words: the query is '<subject> <words>', or '<words> <object>' in the inverse direction.
    phrase: noun phrase for the object, given the subject: 'the capital of {}'.
    inverse: noun phrase for the subject, given the object, for relations whose inverse is worth asking.
    leads_to: kind of entity that the object is, for relations that can be followed further.
    """

    name: str
    kind: EntityKind
    label: str
    words: str
    phrase: str
    inverse: str | None = None
    leads_to: EntityKind | None = None


_ALL = (
    Relation("capital", "country", "Capital", "capital", "the capital of {}", "the country whose capital is {}"),
    Relation("currency", "country", "Currency", "currency", "the currency of {}", "the country whose currency is {}"),
    Relation("highest_point", "country", "Highest point", "highest point", "the highest point of {}",
             "the country whose highest point is {}"),
    Relation("lowest_point", "country", "Lowest point", "lowest point", "the lowest point of {}",
             "the country whose lowest point is {}"),
    Relation("independence_year", "country", "Independence", "independence", "the independence year of {}"),
    Relation("former_ruler", "country", "Independence", "independence", "the former ruler of {}",
             leads_to="country"),
    Relation("internet_code", "country", "Internet code", "internet code", "the internet code of {}",
             "the country whose internet code is {}"),
    Relation("export_partner", "country", "Export partners", "export partners", "the main export partner of {}",
             leads_to="country"),
    Relation("import_partner", "country", "Import partners", "import partners", "the main import partner of {}",
             leads_to="country"),
    Relation("main_export", "country", "Export commodities", "export commodities", "the main export of {}"),
    Relation("main_import", "country", "Import commodities", "import commodities", "the main import of {}"),
    Relation("farm_product", "country", "Farm products", "farm products", "the main farm product of {}"),
    Relation("official_language", "country", "Languages", "languages", "the official language of {}"),
    Relation("demonym", "country", "Demonym", "demonym", "the demonym of {}",
             "the country with demonym {}"),
    Relation("anthem", "country", "National anthem", "national anthem", "the national anthem of {}",
             "the country whose national anthem is {}"),
    Relation("former_name", "country", "Former name", "former name", "the former name of {}",
             "the country formerly named {}"),
    Relation("local_name", "country", "Local name", "local name", "the local name of {}",
             "the country locally named {}"),
    Relation("national_symbol", "country", "National symbol", "national symbol", "the national symbol of {}",
             "the country whose national symbol is {}"),
    Relation("aircraft_prefix", "country", "Aircraft prefix", "aircraft prefix", "the aircraft prefix of {}",
             "the country whose aircraft prefix is {}"),
    Relation("largest_city", "country", "Largest cities", "largest cities", "the largest city of {}",
             "the country whose largest city is {}"),
    Relation("only_neighbor", "country", "Land borders", "land borders", "the only land neighbor of {}",
             leads_to="country"),
    Relation("symbol", "element", "Symbol", "symbol", "the symbol of {}", "the element with symbol {}"),
    Relation("atomic_number", "element", "Atomic number", "atomic number", "the atomic number of {}",
             "the element with atomic number {}"),
    Relation("discovery_year", "element", "Discovery", "discovery", "the discovery year of {}"),
    Relation("discovery_country", "element", "Discovery", "discovery", "the country where {} was discovered",
             leads_to="country"),
    Relation("discoverer", "element", "Discovery", "discovery", "the discoverer of {}",
             "the element discovered by {}"),
)  # fmt: skip

RELATIONS: dict[str, Relation] = {relation.name: relation for relation in _ALL}

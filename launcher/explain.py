"""pydantic's errors in the user's words: key, value, where it was set, what was expected, the nearest valid choice."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from typing import Any, TypeVar, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from launcher.schema import describe, fields_at, known_keys, models_of, tag_of
from launcher.sources import KeyPath, Problem, Settings
from megatron_pbsd.errors import did_you_mean

Chosen = TypeVar("Chosen", bound=BaseModel)


def locate(loc: Sequence[str | int]) -> tuple[KeyPath, str | int | None]:
    """pydantic's location → (key path, index or key inside that list or mapping). The tags of unions are left out."""
    path: KeyPath = ()
    for part in loc:
        fields = fields_at(path) if path else []
        if isinstance(part, int) or any(get_origin(field.annotation) is dict for field in fields):
            return path, part
        tags = [tag_of(model, f.discriminator) for f in fields if f.discriminator for model in models_of(f.annotation)]
        if part not in tags:
            path = (*path, part)
    return path, None


def explain(detail: ErrorDetails, settings: Settings) -> list[Problem]:
    path, inside = locate(detail["loc"])
    if detail["type"] == "value_error" and not path:
        return [conflict(message, settings) for message in str(detail["ctx"]["error"]).splitlines()]
    dotted, given = ".".join(path), detail["input"]
    source = settings.source(path if inside is None else (*path, str(inside)))
    setting = f"{dotted} = {shown(given)}"
    match detail["type"]:
        case "extra_forbidden":
            message = _unknown_key(path, settings)
        case "missing":
            setting, message = dotted, f"is required: {_expected(path)}"
            source = settings.source(path[:-1]) if len(path) > 1 else ""
        case "union_tag_invalid":
            tag = str(detail["ctx"]["discriminator"]).strip("'")
            choices = re.findall("'([^']*)'", detail["ctx"]["expected_tags"])
            given = given[tag]
            setting = f"{dotted}.{tag} = {shown(given)}"
            source = settings.source((*path, tag))
            message = f"expected one of {', '.join(map(repr, choices))}{did_you_mean(str(given), choices)}"
        case "value_error":
            setting, message = dotted, str(detail["ctx"]["error"])
        case _:
            place = f" (element {inside + 1})" if isinstance(inside, int) else f" (key {inside!r})" if inside else ""
            message = f"expected {_expected(path)}{place}{_nearest(detail)}"
    return [Problem(dotted, setting, source, message)]


def validated(section: type[Chosen], settings: Settings) -> tuple[Chosen | None, list[Problem]]:
    """Settings that are no run's, such as a workload: the section that they make, or None, and all problems."""
    problems = list(settings.problems)
    try:
        return section.model_validate(settings.values), problems
    except ValidationError as error:
        for detail in error.errors():
            key = tuple(map(str, detail["loc"]))
            message = detail["msg"] if detail["type"] != "extra_forbidden" else (
                "unknown key" + did_you_mean(key[-1], _keys(section, key[:-1])))
            setting = ".".join(key) if detail["type"] == "missing" else f"{'.'.join(key)} = {shown(detail['input'])}"
            problems.append(Problem(".".join(key), setting, settings.source(key), message))
        return None, problems


def _keys(section: Any, path: Sequence[str]) -> list[str]:
    for key in path:
        section = section.model_fields[key].annotation if key in getattr(section, "model_fields", {}) else None
    return list(getattr(section, "model_fields", {}))


def shown(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _expected(path: KeyPath) -> str:
    field = fields_at(path)[0]
    meaning = f" ({field.description})" if field.description and field.is_required() else ""
    return describe(field.annotation, field.metadata) + meaning


def _nearest(detail: ErrorDetails) -> str:
    """The nearest valid value, where there is one."""
    bounds = detail.get("ctx", {})
    given = detail["input"]
    if detail["type"] == "literal_error":
        return did_you_mean(str(given), re.findall("'([^']*)'", bounds["expected"]))
    for bound in ("ge", "le"):
        if bound in bounds:
            return f"; the nearest valid value is {bounds[bound]:g}"
    if detail["type"] == "int_from_float":
        return f"; the nearest valid value is {round(given)}"
    return ""


def _unknown_key(path: KeyPath, settings: Settings) -> str:
    section, key = path[:-1], path[-1]
    known = list(dict.fromkeys(known_keys()))
    for field in fields_at(section):
        if field.discriminator and path in known:
            tag: Any = settings.values
            for part in (*section, field.discriminator):
                tag = tag[part]
            owners = [tag_of(m, field.discriminator) for m in models_of(field.annotation) if key in m.model_fields]
            return f"is a key of {' and '.join(map(repr, owners))}, not of {tag!r}"
    siblings = [k[-1] for k in known if k[:-1] == section]
    near = difflib.get_close_matches(key, siblings, 1)
    near += [".".join(k) for k in known if k[:-1] != section and (k[-1] == key or ".".join(k) == key)][:3]
    if not near:
        leaves = difflib.get_close_matches(key, sorted({k[-1] for k in known}), 1)
        near = [".".join(k) for k in known if k[-1] in leaves][:3]
    if near:
        return f"unknown key; did you mean {' or '.join(map(repr, near))}?"
    return f"unknown key; {'.'.join(section) or 'the top level'} has: {', '.join(siblings)}"


def conflict(message: str, settings: Settings) -> Problem:
    """A conflict's message begins with `key = value`."""
    setting, _, rest = message.partition(" = ")
    value, _, reason = rest.partition(" ")
    return Problem(setting, f"{setting} = {value}", settings.source(tuple(setting.split("."))), reason)

"""Reading a Hugging Face config.json so that no field which changes the mathematics goes unnoticed."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_pbsd.models.errors import ModelError


@dataclass(frozen=True)
class FieldRule:
    """mapped: read by the family. only: must have one of `values`. ignored: does not change the mathematics."""

    kind: Literal["mapped", "only", "ignored"]
    values: tuple[Any, ...] = ()


def mapped() -> FieldRule:
    return FieldRule("mapped")


def only(*values: Any) -> FieldRule:
    return FieldRule("only", values)


def ignored() -> FieldRule:
    return FieldRule("ignored")


def checked(
    config: Mapping[str, Any], rules: Mapping[str, FieldRule], required: tuple[str, ...], prefix: str = ""
) -> None:
    """ModelError with one sentence per field that is missing, unknown or has an unsupported value."""
    problems = [f"'{prefix}{name}' is missing" for name in required if name not in config]
    for name, value in config.items():
        rule = rules.get(name)
        if rule is None:
            near = difflib.get_close_matches(name, rules, 1)
            problems.append(f"'{prefix}{name}' = {value!r} is not known to this model family"
                            + (f"; did you mean {near[0]!r}?" if near else ""))
        elif rule.kind == "only" and value not in rule.values:
            problems.append(f"'{prefix}{name}' = {value!r} is not implemented; "
                            f"supported: {', '.join(map(repr, rule.values))}")
    if problems:
        raise ModelError("config.json: " + "; ".join(problems))


def read(folder: str | Path) -> dict[str, Any]:
    """config.json of a model folder. ModelError naming the path when it is missing or no JSON."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ModelError(f"{path} does not exist: model.path must be a folder in Hugging Face format")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ModelError(f"{path} is not JSON: {error}") from error

"""What the configuration tree looks like: which keys exist, where, and what each expects. Read off `RunConfig`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from megatron_pbsd.config import RunConfig


def models_of(annotation: Any) -> list[type[BaseModel]]:
    """The section types that an annotation admits: one, several for a union, none for a plain value."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, UnionType, Annotated):
        return [model for part in get_args(annotation) for model in models_of(part)]
    return []


def tag_of(model: type[BaseModel], key: str) -> str:
    """The value of the discriminating field `key` that selects `model` out of a union."""
    return get_args(model.model_fields[key].annotation)[0]


def fields_at(path: Sequence[str], root: type[BaseModel] = RunConfig) -> list[FieldInfo]:
    """Every field that a key path may mean, one per variant of the unions on the way; empty if there is none."""
    models, fields = [root], []
    for key in path:
        fields = [model.model_fields[key] for model in models if key in model.model_fields]
        models = [model for field in fields for model in models_of(field.annotation)]
    return fields


def known_keys(root: type[BaseModel] = RunConfig, prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Paths of all keys, sections included; a key that several variants share comes once per variant."""
    for key, field in root.model_fields.items():
        yield (*prefix, key)
        for model in models_of(field.annotation):
            yield from known_keys(model, (*prefix, key))


def describe(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """What a value must be, in words: `a whole number >= 1`, `one of 'ray', 'inline'`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner = [part for item in arguments[1:] for part in (item.metadata if isinstance(item, FieldInfo) else [item])]
        return describe(arguments[0], inner)
    if models := models_of(annotation):
        keys = dict.fromkeys(key for model in models for key in model.model_fields)
        return "a section with the keys " + ", ".join(keys)
    if origin in (Union, UnionType):
        return " or ".join(describe(part) for part in arguments)
    if origin is Literal:
        return ("one of " if len(arguments) > 1 else "") + ", ".join(repr(choice) for choice in arguments)
    if origin is dict:
        return f"a mapping whose keys are {describe(arguments[0])} and whose values are {describe(arguments[1])}"
    if origin is tuple:
        return f"a list, each element {describe(arguments[0])}"
    names = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text", NoneType: "null",
             Any: "anything"}
    return (names[annotation] + " " + _bounds(metadata)).strip()


def _bounds(metadata: Sequence[Any]) -> str:
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<", "pattern": "that matches"}
    bounds = [f"{sign} {value:g}" if not isinstance(value, str) else f"{sign} {value}"
              for item in metadata for name, sign in signs.items()
              if (value := getattr(item, name, None)) is not None]
    return " and ".join(bounds)

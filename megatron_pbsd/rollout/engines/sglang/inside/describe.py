"""Prints the fields of the ServerArgs that are installed, as JSON: {name: {"type": …, "choices": […] or null}}.

A type is the names of Python's own that fit, `null` and `list`, `dict` among them, or empty where that is not plain.
"""

from __future__ import annotations

import json
import types
import typing


def plain(annotation):
    """Names of the types that fit; None if that cannot be said."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        parts = [plain(part) for part in typing.get_args(annotation)]
        return None if None in parts else sorted({name for part in parts for name in part})
    if origin is typing.Literal:
        return sorted({"null" if value is None else type(value).__name__ for value in typing.get_args(annotation)})
    kind = origin or annotation
    if kind is type(None):
        return ["null"]
    return [kind.__name__] if kind in (bool, int, float, str, list, dict) else None


def choices(annotation, declared):
    if declared:
        return list(declared)
    if typing.get_origin(annotation) is typing.Literal:
        return list(typing.get_args(annotation))
    for part in typing.get_args(annotation):
        if typing.get_origin(part) is typing.Literal:
            return list(typing.get_args(part))
    return None


def main():
    from sglang.srt.arg_groups.arg_utils import record_fields
    from sglang.srt.server_args import ServerArgs

    hints = typing.get_type_hints(ServerArgs, include_extras=True)
    described = {}
    for field in record_fields(ServerArgs):
        hint, declared = hints[field.name], None
        if typing.get_origin(hint) is typing.Annotated:
            hint, *metadata = typing.get_args(hint)
            declared = next((item.choices for item in metadata if getattr(item, "choices", None)), None)
        described[field.name] = {"type": plain(hint) or [], "choices": choices(hint, declared)}
    print(json.dumps(described))


if __name__ == "__main__":
    main()

"""Where configuration comes from: a YAML file and dotted overrides, read into one tree that remembers its sources."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import yaml
from pydantic.fields import FieldInfo

from launcher.schema import fields_at, models_of, tag_of
from megatron_pbsd.errors import UsageError

KeyPath = tuple[str, ...]


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong. `key` is dotted and may be empty, `setting` is `key = value` as given."""

    key: str
    setting: str
    source: str
    message: str

    def __str__(self) -> str:
        head = self.setting + (f"   ({self.source})" if self.source else "")
        return "\n".join([f"  {head}", *(f"      {line}" for line in self.message.splitlines())])


class ConfigError(UsageError):
    """The configuration is wrong; the message lists every problem."""

    component = "config"

    def __init__(self, path: Path | str, problems: Sequence[Problem]):
        self.problems = tuple(problems)
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(f"{path} has {count}:\n\n" + "\n".join(str(problem) for problem in problems))


@dataclass
class Settings:
    """Nested plain values, and for each key path that was set, where."""

    values: dict[str, Any] = field(default_factory=dict)
    sources: dict[KeyPath, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def source(self, path: KeyPath) -> str:
        """Where the value at `path`, something inside it, or the section around it, was set."""
        inside = [known for known in self.sources if known[: len(path)] == path]
        around = [path[:n] for n in range(len(path) - 1, 0, -1)]
        return next((self.sources[known] for known in (*inside, *around) if known in self.sources), "")

    def set(self, path: KeyPath, value: Any, source: str) -> None:
        node = self.values
        for key in path[:-1]:
            if not isinstance(node.get(key), dict):
                node[key] = {}
            node = node[key]
        node[path[-1]] = value
        self.sources[path] = source


class _Loader(yaml.SafeLoader):
    """Scalars as JSON reads them: `3e-4` is a number, `no` and `2026-01-01` are text."""

    yaml_implicit_resolvers: ClassVar[dict[str, list[tuple[str, re.Pattern[str]]]]] = {}


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("int", r"[-+]?[0-9]+(_[0-9]+)*", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
     "-+0123456789."),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"),
                                  ["" if c == "\0" else c for c in _first])


def read_yaml(path: Path) -> Settings:
    """Read a file. Duplicate keys become problems; what cannot be read at all is a ConfigError at once."""
    def unreadable(message: str) -> ConfigError:
        return ConfigError(path, [Problem("", str(path), "", message)])

    try:
        loader = _Loader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        settings = Settings()
        if node is None:
            return settings
        if not isinstance(node, yaml.MappingNode):
            raise unreadable("expected a mapping of keys to values at the top level")
        settings.values = _mapping(loader, node, (), path, settings)
        return settings
    except FileNotFoundError:
        raise unreadable("no such file" + _neighbours(path)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(f"cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise unreadable(f"is not valid YAML: {error}") from None


def _mapping(loader: _Loader, node: yaml.MappingNode, prefix: KeyPath, path: Path,
             settings: Settings) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = str(key_node.value)
        here = (*prefix, key)
        source = f"{path}:{key_node.start_mark.line + 1}"
        if key in values:
            dotted = ".".join(here)
            settings.problems.append(Problem(
                dotted, dotted, source, f"given twice; first at {settings.sources[here]}: keep one of the two"))
            continue
        settings.sources[here] = source
        if isinstance(value_node, yaml.MappingNode):
            values[key] = _mapping(loader, value_node, here, path, settings)
        else:
            values[key] = loader.construct_object(value_node, deep=True)
    return values


def _neighbours(path: Path) -> str:
    """Name the YAML files beside a path that does not exist."""
    if not path.parent.is_dir():
        return f"; neither is there a folder {path.parent}"
    found = sorted(p.name for p in path.parent.glob("*.y*ml"))
    return f"; in {path.parent} there are: {', '.join(found)}" if found else ""


def apply_overrides(settings: Settings, tokens: Sequence[str]) -> None:
    """Set `--a.b value` and `--a.b=value` on top. Values are read as YAML; text fields take them as they are.

    Another `--algorithm.name` than the file's drops the keys that only the file's algorithm knows.
    """
    remaining = list(tokens)
    while remaining:
        token = remaining.pop(0)
        if not token.startswith("--") or len(token) == 2:
            settings.problems.append(Problem("", token, "command line", "expected an override: --section.key value"))
            continue
        flag, equals, text = token.partition("=")
        key = flag[2:]
        if not equals:
            if not remaining or remaining[0].startswith("--"):
                settings.problems.append(Problem(key, flag, "command line", f"needs a value: {flag} VALUE"))
                continue
            text = remaining.pop(0)
        path = tuple(key.split("."))
        value = _value(path, text)
        _switch_variant(settings, path, value)
        settings.set(path, value, "command line")


def _value(path: KeyPath, text: str) -> Any:
    fields = fields_at(path)
    if fields and all(field.annotation is str for field in fields):
        return text
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError:
        return text  # validation names the key and what it expects


def _switch_variant(settings: Settings, path: KeyPath, value: Any) -> None:
    section, key = path[:-1], path[-1]
    unions = [field for field in fields_at(section) if field.discriminator == key]
    values: Any = settings.values
    for part in section:
        values = values.get(part) if isinstance(values, dict) else None
    if not unions or not isinstance(values, dict):
        return
    variants = {tag_of(model, key): model for model in models_of(unions[0].annotation)}
    previous = values.get(key, getattr(unions[0].default, key, None))
    if previous in variants and value in variants:
        before, after = variants[previous].model_fields, variants[value].model_fields
        for name in before:
            if name not in after or not _is_variant(values.get(name), before[name], after[name]):
                values.pop(name, None)


def _is_variant(section: Any, before: FieldInfo, after: FieldInfo) -> bool:
    """Whether a section that was a variant of one union is one of the other too; true for anything else."""
    if not (isinstance(section, dict) and before.discriminator and before.discriminator == after.discriminator):
        return True
    tag = section.get(before.discriminator, getattr(before.default, before.discriminator))
    return tag in [tag_of(model, after.discriminator) for model in models_of(after.annotation)]
